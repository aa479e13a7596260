//! Client of one guest agent: connections, token, and the transport of calls.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use connectrpc::{
    ConnectError, ErrorCode,
    client::{CallOptions, ClientBody, ClientConfig, ClientTransport},
};
use futures::future::BoxFuture;
use http::{HeaderValue, Request, Response, Uri, header};
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{self, Client},
    rt::{TokioExecutor, TokioTimer},
};
use wrenn_model::ByteBudget;
use wrenn_proto::{
    headers::ACCESS_TOKEN,
    rpc::{filesystem::FilesystemClient, process::ProcessClient},
};

use crate::{
    Dial, Stream,
    broken::{Broken, ResponseBody, lost},
    deadline::within,
    dial::{Connector, TcpDial},
};

/// Maximum idle time of a pooled connection. Below that of the guest agent, so that no request is
/// sent on a connection that is being closed.
const IDLE_DEADLINE: Duration = Duration::from_secs(60);

/// Maximum number of idle connections.
const MAX_IDLE_CONNECTIONS: usize = 16;

/// Maximum response size of a call, in bytes. Listings of large directories are the largest.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;

/// Maximum size of `/metrics` responses and error bodies, in bytes.
pub(crate) const MAX_SMALL_ANSWER_BYTES: usize = 64 * 1024;

/// Origin of all URIs. The connector does not use it.
const ORIGIN: &str = "http://envd";

/// Body of a request.
pub(crate) type RequestBody = UnsyncBoxBody<Bytes, ConnectError>;

/// Transport of one Connect call, over the same connections as the plain requests.
#[derive(Clone)]
pub(crate) struct Transport {
    http: Client<Connector, RequestBody>,
    broken: Broken,
    /// Budget of responses; `None` if they are streams.
    budget: Option<ByteBudget>,
}

impl ClientTransport for Transport {
    type ResponseBody = ResponseBody;
    type Error = ConnectError;

    fn send(
        &self,
        request: Request<ClientBody>,
    ) -> BoxFuture<'static, Result<Response<ResponseBody>, ConnectError>> {
        let answer = self.http.request(request.map(BodyExt::boxed_unsync));
        let broken = self.broken.clone();
        let reserved = self.budget.as_ref().map(ByteBudget::empty);
        Box::pin(async move {
            let answer = answer.await.map_err(transport_failed)?;
            Ok(answer.map(|body| ResponseBody {
                body,
                broken,
                reserved,
            }))
        })
    }
}

/// Client of the guest agent of one sandbox. Clones share their connections.
#[derive(Clone)]
pub struct EnvdClient {
    dial: Arc<dyn Dial>,
    token: HeaderValue,
    config: ClientConfig,
    http: Client<Connector, RequestBody>,
    budget: ByteBudget,
}

impl std::fmt::Debug for EnvdClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EnvdClient").finish_non_exhaustive()
    }
}

impl EnvdClient {
    /// Creates a client that opens its connections with `dial`. Does not connect yet.
    ///
    /// # Errors
    /// If the token contains characters that a header cannot hold.
    pub fn new(dial: Arc<dyn Dial>, token: &str) -> Result<Self, ConnectError> {
        let token = token_header(token)?;
        let config = ClientConfig::new(Uri::from_static(ORIGIN))
            .with_default_header(ACCESS_TOKEN, token.clone())
            .with_default_max_message_size(MAX_ANSWER_BYTES);
        let http = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_DEADLINE)
            .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS)
            .build(Connector(Arc::clone(&dial)));
        Ok(Self {
            dial,
            token,
            config,
            http,
            budget: ByteBudget::unlimited(),
        })
    }

    /// Accounts lists, which are decoded as a whole, to a budget. By default they have no limit but
    /// that of a message.
    #[must_use]
    pub fn with_budget(self, budget: ByteBudget) -> Self {
        Self { budget, ..self }
    }

    /// Creates a client of the guest agent at `address`. Does not connect yet.
    ///
    /// # Errors
    /// If the token contains characters that a header cannot hold.
    pub fn over_tcp(address: SocketAddr, token: &str) -> Result<Self, ConnectError> {
        Self::new(Arc::new(TcpDial(address)), token)
    }

    /// Returns a client on the same connections that sends another token with its plain HTTP
    /// requests.
    ///
    /// # Errors
    /// If the token contains characters that a header cannot hold.
    pub fn showing(&self, token: &str) -> Result<Self, ConnectError> {
        Ok(Self {
            token: token_header(token)?,
            ..self.clone()
        })
    }

    /// Returns a client of the process service, for one call.
    pub(crate) fn process(&self) -> (ProcessClient<Transport>, Broken) {
        let (transport, broken) = self.transport(None);
        (ProcessClient::new(transport, self.config.clone()), broken)
    }

    /// Returns a client of the file system service, for one call.
    pub(crate) fn filesystem(&self) -> (FilesystemClient<Transport>, Broken) {
        let (transport, broken) = self.transport(Some(self.budget.clone()));
        let client = FilesystemClient::new(transport, self.config.clone());
        (client, broken)
    }

    fn transport(&self, budget: Option<ByteBudget>) -> (Transport, Broken) {
        let broken = Broken::default();
        let transport = Transport {
            http: self.http.clone(),
            broken: broken.clone(),
            budget,
        };
        (transport, broken)
    }

    /// Opens a connection outside of the pool.
    pub(crate) async fn dial(&self) -> Result<Stream, ConnectError> {
        self.dial.dial().await
    }

    pub(crate) fn request(
        &self,
        method: http::Method,
        path_and_query: &str,
    ) -> http::request::Builder {
        Request::builder()
            .method(method)
            .uri(format!("{ORIGIN}{path_and_query}"))
            .header(ACCESS_TOKEN, self.token.clone())
    }

    pub(crate) async fn send(
        &self,
        request: Request<RequestBody>,
        deadline: Duration,
    ) -> Result<Response<Incoming>, ConnectError> {
        within(deadline, self.send_slowly(request)).await
    }

    /// Sends a request without a deadline, because its duration depends on its body.
    pub(crate) async fn send_slowly(
        &self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, ConnectError> {
        self.http.request(request).await.map_err(transport_failed)
    }
}

/// Sets the guest user that the call runs as. With an empty `user`, the guest agent chooses its
/// default.
pub(crate) fn as_user(options: CallOptions, user: &str) -> Result<CallOptions, ConnectError> {
    match basic_auth(user)? {
        Some(value) => options.try_with_header(header::AUTHORIZATION, value),
        None => Ok(options),
    }
}

pub(crate) fn basic_auth(user: &str) -> Result<Option<String>, ConnectError> {
    if user.is_empty() {
        return Ok(None);
    }
    if user.contains(':') || user.chars().any(char::is_control) {
        return Err(ConnectError::invalid_argument(format!(
            "`user`: {user:?} is not a valid user name"
        )));
    }
    let credentials = BASE64_STANDARD.encode(format!("{user}:"));
    Ok(Some(format!("Basic {credentials}")))
}

/// Maps the guest agent's "unauthenticated" to "invalid argument": for callers of this client, an
/// unknown user is a wrong argument, not a lack of credentials. The user may be the guest's
/// default, which a program in the guest can remove.
pub(crate) fn unknown_user(user: &str) -> impl Fn(ConnectError) -> ConnectError {
    let user = user.to_owned();
    move |mut error| {
        let message = error.message.as_deref().unwrap_or_default();
        let is_about_user = !user.is_empty() || names_user(message);
        if error.code == ErrorCode::Unauthenticated && is_about_user {
            error.code = ErrorCode::InvalidArgument;
        }
        error
    }
}

/// True if a message of the guest agent says that a user does not exist. The text is part of the
/// contract.
pub(crate) fn names_user(message: &str) -> bool {
    message.starts_with("invalid username")
}

fn token_header(token: &str) -> Result<HeaderValue, ConnectError> {
    let mut header = HeaderValue::from_str(token).map_err(|_| {
        ConnectError::internal("the guest agent's token is not a valid header value")
    })?;
    header.set_sensitive(true);
    Ok(header)
}

pub(crate) fn full(body: impl Into<Bytes>) -> RequestBody {
    let body = http_body_util::Full::new(body.into());
    UnsyncBoxBody::new(body.map_err(|never| match never {}))
}

pub(crate) fn bad_request(error: http::Error) -> ConnectError {
    ConnectError::invalid_argument(format!("invalid request: {error}"))
}

/// Returns the error of [`Dial::dial`] or of the request's body, if that is the cause, else the
/// loss of the connection.
fn transport_failed(error: legacy::Error) -> ConnectError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(error) = cause {
        if let Some(own) = error.downcast_ref::<ConnectError>() {
            return own.clone();
        }
        cause = error.source();
    }
    lost(error)
}
