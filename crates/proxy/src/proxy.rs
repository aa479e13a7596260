//! Request handling: from routing and access checks to the response.

use std::{net::IpAddr, sync::Arc, time::Duration};

use http::{Method, Request, Response, StatusCode, Uri, Version, uri::PathAndQuery};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wrenn_http_server::{DrainingBody, Limits};
use wrenn_model::SandboxId;
use wrenn_proto::guest;

use crate::{
    ConnectionKillSwitch, Found, Sandboxes, SignedLink, Target, access,
    body::AnswerBody,
    failure::{self, Failure},
    forward, headers,
    pool::Pools,
    preflight,
    route::{self, Address, BadAddress, Route},
    upgrade,
};

/// Time that a sandbox has to become available: a resume may have to wait for its turn.
const RESOLVE_DEADLINE: Duration = Duration::from_secs(120);

/// Maximum number of header fields per request. Servers behind ports may need more than the API
/// does.
const MAX_HEADERS: usize = 200;

/// Settings of the proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyConfig {
    /// Host names of this machine on which the routing headers are honored, as they are on
    /// `localhost`.
    pub shared_names: Vec<String>,
    /// Maximum number of concurrent client connections; a further client takes the place of an idle
    /// connection, or waits.
    pub max_clients: usize,
    /// Maximum number of concurrent client connections per peer; a further client of the peer takes
    /// the place of an idle connection of the peer, or is answered 429.
    pub max_clients_per_peer: usize,
    /// Maximum number of concurrent connections per sandbox; a request that needs one more is
    /// answered with 429.
    pub max_connections: usize,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            shared_names: Vec::new(),
            max_clients: 8192,
            max_clients_per_peer: 1024,
            max_connections: 512,
        }
    }
}

/// Traffic proxy. Clones share the same state.
pub struct Proxy<S: Sandboxes>(Arc<Inner<S>>);

struct Inner<S: Sandboxes> {
    sandboxes: Arc<S>,
    pools: Pools<S>,
    kill_switch: ConnectionKillSwitch,
    config: ProxyConfig,
    /// Upgraded connections, which outlive their requests.
    upgraded: TaskTracker,
    /// Cancels upgraded connections.
    end: CancellationToken,
}

impl<S: Sandboxes> Clone for Proxy<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S: Sandboxes> Proxy<S> {
    /// Creates a proxy for `sandboxes`. It learns through `kill_switch` that a sandbox stopped.
    #[must_use]
    pub fn new(sandboxes: Arc<S>, kill_switch: ConnectionKillSwitch, config: ProxyConfig) -> Self {
        Self(Arc::new(Inner {
            pools: Pools::new(
                Arc::clone(&sandboxes),
                kill_switch.clone(),
                config.max_connections,
            ),
            sandboxes,
            kill_switch,
            config,
            upgraded: TaskTracker::new(),
            end: CancellationToken::new(),
        }))
    }

    /// Serves `listener` until `shutdown` is cancelled. Requests in progress then have five seconds
    /// to finish. Must be called only once.
    pub async fn serve(&self, listener: TcpListener, shutdown: CancellationToken) {
        let limits = Limits {
            clients: self.0.config.max_clients,
            clients_per_peer: self.0.config.max_clients_per_peer,
            headers: MAX_HEADERS,
        };
        let inner = Arc::clone(&self.0);
        let answer = move |request, client| {
            let inner = Arc::clone(&inner);
            async move { inner.answer(request, client).await }
        };
        wrenn_http_server::serve(listener, limits, answer, shutdown).await;
        self.0.end.cancel();
        self.0.upgraded.close();
        self.0.upgraded.wait().await;
        self.0.kill_switch.forget_all();
    }
}

impl<S: Sandboxes> Inner<S> {
    /// Answers a request; every failure becomes a response.
    async fn answer(&self, request: Request<DrainingBody>, client: IpAddr) -> Response<AnswerBody> {
        let browser = failure::is_browser(request.headers());
        let mut address = None;
        match self.try_answer(request, client, &mut address).await {
            Ok(response) => response,
            Err(failure) => {
                tracing::debug!(address = address.as_ref().map(tracing::field::display), %failure, "request not forwarded");
                failure
                    .answer(address.as_ref(), browser)
                    .map(AnswerBody::own)
            }
        }
    }

    async fn try_answer(
        &self,
        request: Request<DrainingBody>,
        client: IpAddr,
        known: &mut Option<Address>,
    ) -> Result<Response<AnswerBody>, Failure> {
        if request.method() == Method::CONNECT {
            return Err(Failure::BadTarget);
        }
        let route = route::route(request.uri(), request.headers(), &self.config.shared_names)?;
        if route == Route::Unaddressed
            && let Some(answer) = preflight::answer(&request)
        {
            return Ok(answer.map(AnswerBody::own));
        }
        let address = self.address(route, &request).await?;
        let address = known.insert(address);
        failure::check_path(address, request.uri().path())?;
        // Well-formed for E2B, but no id of this platform has this form.
        let id: SandboxId = address.id.parse().map_err(|_| Failure::NotFound)?;
        let found = self.look_up(&id).await?;
        // A preflight shows no token. It must not resume a sandbox.
        if address.port == guest::ENVD_PORT
            && !found.is_running
            && let Some(answer) = preflight::answer(&request)
        {
            return Ok(answer.map(AnswerBody::own));
        }
        access::check(&request, address.port, &found)?;
        let target = match found.is_running {
            true => found.target,
            false => self.resolve(&id).await?,
        };
        self.forward(request, client, &id, address.port, &target)
            .await
    }

    async fn address(
        &self,
        route: Route,
        request: &Request<DrainingBody>,
    ) -> Result<Address, Failure> {
        match route {
            Route::Port(address) => Ok(address),
            Route::Unaddressed => Ok(Address {
                id: self.unaddressed(request).await?.to_string(),
                port: guest::ENVD_PORT,
            }),
        }
    }

    /// Finds the sandbox of a request that names none: by the guest agent's token that it shows, as
    /// older SDKs do after a connect, or by the signature of a link.
    async fn unaddressed(&self, request: &Request<DrainingBody>) -> Result<SandboxId, Failure> {
        let shown = request.headers().get(headers::ACCESS_TOKEN);
        if let Some(token) = shown.and_then(|token| token.to_str().ok()) {
            let found = self.sandboxes.with_token(token).await?;
            return found.ok_or(Failure::NotFound);
        }
        let uri = request.uri();
        let query = uri.query().unwrap_or_default();
        let link =
            SignedLink::parse(request.method(), uri.path(), query).ok_or(BadAddress::Headers)?;
        self.sandboxes
            .signed_by(&link)
            .await?
            .ok_or(Failure::NoSuchLink)
    }

    async fn look_up(&self, id: &SandboxId) -> Result<Found, Failure> {
        let found = tokio::time::timeout(RESOLVE_DEADLINE, self.sandboxes.look_up(id)).await;
        Ok(found.map_err(|_| Failure::Changing)??)
    }

    async fn resolve(&self, id: &SandboxId) -> Result<Target, Failure> {
        let resolved = tokio::time::timeout(RESOLVE_DEADLINE, self.sandboxes.resolve(id)).await;
        Ok(resolved.map_err(|_| Failure::Changing)??)
    }

    async fn forward(
        &self,
        mut request: Request<DrainingBody>,
        client: IpAddr,
        id: &SandboxId,
        port: u16,
        target: &Target,
    ) -> Result<Response<AnswerBody>, Failure> {
        let in_use = self.sandboxes.begin_use(id);
        let authority = route::authority(request.uri(), request.headers())?;
        let is_envd = port == guest::ENVD_PORT;
        // The guest agent supports no other protocol, and requests in another one could not be
        // checked.
        let protocol = headers::requested_upgrade(request.headers()).filter(|_| !is_envd);
        let upgrading = protocol.is_some().then(|| hyper::upgrade::on(&mut request));
        let context = headers::ForwardContext {
            port,
            is_envd,
            authority: &authority,
            client,
            target,
        };
        let (mut head, body) = request.into_parts();
        headers::prepare_request(&mut head.headers, &context, protocol.as_ref());
        head.uri = forwarded_uri(&head.uri, port)?;
        head.version = Version::HTTP_11;
        let answered = forward::send(&self.pools, id, head, body, async || {
            self.resolve(id).await.map(drop)
        })
        .await?;
        let (mut response, pool) = (answered.response, answered.pool);
        let status = response.status();
        headers::prepare_answer(response.headers_mut(), status);
        *response.version_mut() = Version::HTTP_11;
        if status == StatusCode::SWITCHING_PROTOCOLS {
            let client = upgrading.ok_or_else(|| {
                Failure::Unreachable("the server switched protocols without being asked".to_owned())
            })?;
            let sandbox = hyper::upgrade::on(&mut response);
            let joined = upgrade::join(client, sandbox, self.end.clone());
            self.upgraded.spawn(async move {
                let _held = (in_use, pool);
                joined.await;
            });
            return Ok(response.map(|_| AnswerBody::own(bytes::Bytes::new())));
        }
        Ok(response.map(|body| AnswerBody::streamed(body, (in_use, pool))))
    }
}

/// Builds the URI for the sandbox's client. Path and query are forwarded byte for byte.
fn forwarded_uri(asked: &Uri, port: u16) -> Result<Uri, Failure> {
    let path = asked.path_and_query().cloned();
    Uri::builder()
        .scheme("http")
        .authority(format!("sandbox:{port}"))
        .path_and_query(path.unwrap_or_else(|| PathAndQuery::from_static("/")))
        .build()
        .map_err(|_| Failure::BadTarget)
}
