//! Sends a request to a sandbox. A request is repeated only if that cannot execute it twice.

use std::{error::Error, sync::Arc};

use http::{Method, Request, Response, request::Parts};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use wrenn_http_server::DrainingBody;
use wrenn_model::SandboxId;

use crate::{
    DialError, Sandboxes,
    body::RequestBody,
    failure::Failure,
    pool::{Answers, Pool, Pools},
};

/// Response of a sandbox, and the pool that it came through.
pub(crate) struct Answered<S: Sandboxes> {
    pub(crate) response: Response<Incoming>,
    pub(crate) pool: Arc<Pool<S>>,
}

/// Sends a request whose head is ready. `resolve_again` is called before a second attempt, to check
/// that the sandbox still exists.
pub(crate) async fn send<S: Sandboxes>(
    pools: &Pools<S>,
    id: &SandboxId,
    head: Parts,
    body: DrainingBody,
    resolve_again: impl AsyncFnOnce() -> Result<(), Failure>,
) -> Result<Answered<S>, Failure> {
    let body = RequestBody::new(body);
    let first = match attempt(pools.get(id), head.clone(), body.clone()).await {
        Ok(answered) => return Ok(answered),
        Err(failed) => failed,
    };
    if !first.may_be_repeated(&head.method, &body) {
        return Err(first.failure);
    }
    tracing::debug!(%id, why = %first.failure, "retrying request");
    resolve_again().await?;
    attempt(pools.get(id), head, body)
        .await
        .map_err(|second| second.failure)
}

/// Failed attempt to send a request.
struct Failed {
    failure: Failure,
    /// True if nothing was sent because the sandbox was not running; its state may differ from the
    /// one that was resolved.
    stopped: bool,
    /// True if the connection had answered a request before, so that the server may just have
    /// closed it as idle.
    kept: bool,
}

impl Failed {
    fn may_be_repeated(&self, method: &Method, body: &RequestBody) -> bool {
        use http_body::Body as _;
        let repeats_nothing = method.is_idempotent() && body.is_end_stream();
        !body.is_begun() && (self.stopped || (self.kept && repeats_nothing))
    }
}

async fn attempt<S: Sandboxes>(
    pool: Arc<Pool<S>>,
    head: Parts,
    body: RequestBody,
) -> Result<Answered<S>, Failed> {
    let request = Request::from_parts(head, body);
    match pool.client.request(request).await {
        Ok(mut response) => {
            if let Some(answers) = response.extensions_mut().remove::<Answers>() {
                answers.add();
            }
            Ok(Answered { response, pool })
        }
        Err(error) => Err(explain(&error, pool.cut.is_cancelled())),
    }
}

fn explain(error: &legacy::Error, is_cut: bool) -> Failed {
    let dialed = find::<DialError>(error);
    let failure = match dialed {
        Some(DialError::PortClosed) => Failure::PortClosed,
        Some(DialError::TooMany) => Failure::TooMany,
        Some(DialError::NotRunning) => Failure::NotFound,
        Some(other) => Failure::Unreachable(other.to_string()),
        None if is_cut => Failure::NotFound,
        None => Failure::Unreachable("the connection closed before a response arrived".to_owned()),
    };
    let mut extras = http::Extensions::new();
    if let Some(connection) = error.connect_info() {
        connection.get_extras(&mut extras);
    }
    Failed {
        failure,
        stopped: matches!(dialed, Some(DialError::NotRunning)),
        kept: extras
            .get::<Answers>()
            .is_some_and(|answers| answers.count() > 0),
    }
}

fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}
