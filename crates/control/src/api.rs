//! The REST API: routes and the middleware that every request passes through.
//!
//! Owns the mapping between HTTP and the rest of this crate. Never decides the fate of a sandbox
//! (`lifecycle` does), and never buffers a whole file or a whole output unless the caller asked for
//! it in one piece.
//!
//! Middleware, from the outside in:
//!
//! 1. A tracing span for the log.
//! 2. CORS headers for the E2B API, and answers to preflight requests, which carry no key. Pages of
//!    other origins may use the E2B API, not `/v1`.
//! 3. The panic handler.
//! 4. The check of the API key, before any upgrade. Exempt are `/health` and those paths of the E2B
//!    API that are not implemented and whose clients send no key.
//! 5. The route.

mod api_keys;
mod controls;
pub(crate) mod error;
mod exec;
mod exec_stream;
pub(crate) mod extract;
mod files;
mod files_stream;
mod health;
mod host;
mod metrics;
pub(crate) mod openapi;
mod pause;
mod process;
mod processes;
mod pty;
mod sandboxes;
mod session;
pub(crate) mod snapshots;
mod socket;
mod templates;
mod unknown;
mod utf8;
pub(crate) mod validate;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use http::{Method, StatusCode, Uri};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument as _;
use utoipa_axum::{router::OpenApiRouter, routes};
use wrenn_proto::{SandboxId, rest::Egress};

use crate::{
    agent_client::AgentClient,
    auth::Auth,
    db::Db,
    e2b,
    guest::{Guest, Guests},
    host::Host,
    lifecycle::{ActivityGuard, Lifecycle},
    samples::Samples,
};
use error::{ApiError, Code};

/// Name of the header that carries the API key.
const KEY_HEADER: &str = "x-api-key";

/// Maximum time that a call waits for a sandbox that is still booting.
const BOOT_WAIT: Duration = Duration::from_secs(60);

/// State shared by all handlers.
pub(crate) struct App {
    pub(crate) db: Db,
    pub(crate) agent: AgentClient,
    pub(crate) guests: Arc<Guests>,
    pub(crate) host: Host,
    pub(crate) auth: Arc<Auth>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    /// Resource usage of sandboxes over time.
    pub(crate) samples: Arc<Samples>,
    pub(crate) default_egress: Egress,
    /// Cancelled when the server shuts down, so that long sessions close their connections.
    pub(crate) shutdown: CancellationToken,
    /// WebSocket sessions. The HTTP server does not track a connection after its upgrade.
    pub(crate) sessions: TaskTracker,
}

/// Shared state, as handlers extract it.
pub(crate) type AppState = Arc<App>;

impl App {
    /// Returns the guest of a running sandbox, which counts as active until the guard is dropped. Waits for a
    /// sandbox that is booting, and resumes a paused sandbox that was created with `auto_resume`.
    async fn ready(&self, id: &SandboxId) -> Result<(Guest, ActivityGuard), ApiError> {
        let (row, used) = self.lifecycle.enter(id, BOOT_WAIT).await?;
        Ok((self.guests.get(&row)?, used))
    }
}

/// Routes below a sandbox, with their documentation.
fn sandbox_routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(sandboxes::create, sandboxes::list))
        .routes(routes!(sandboxes::get, sandboxes::destroy))
        .routes(routes!(sandboxes::ping))
        .routes(routes!(pause::pause))
        .routes(routes!(pause::resume))
        .routes(routes!(pause::fork))
        .routes(routes!(metrics::get))
        .routes(routes!(exec::exec))
        .routes(routes!(exec_stream::exec_stream))
        .routes(routes!(pty::pty))
        .routes(routes!(processes::list))
        .routes(routes!(processes::kill))
        .routes(routes!(processes::stream))
        .routes(routes!(files::write))
        .routes(routes!(files::read))
        .routes(routes!(files::list))
        .routes(routes!(files::mkdir))
        .routes(routes!(files::remove))
        .routes(routes!(files_stream::write))
        .routes(routes!(files_stream::read))
}

/// All routes, with their documentation.
fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::with_openapi(openapi::base())
        .routes(routes!(health::health))
        .routes(routes!(openapi::document))
        .routes(routes!(host::get))
        .routes(routes!(unknown::list))
        .routes(routes!(unknown::adopt))
        .routes(routes!(unknown::destroy))
        .routes(routes!(templates::list))
        .routes(routes!(snapshots::create, snapshots::list))
        .routes(routes!(snapshots::get, snapshots::delete))
        .routes(routes!(api_keys::create, api_keys::list))
        .routes(routes!(api_keys::delete))
        .nest("/v1/sandboxes", sandbox_routes())
        .nest("/v1/capsules", sandbox_routes())
        .merge(e2b::routes())
}

/// Builds the service: all routes and the middleware around them.
pub(crate) fn router(app: AppState) -> Router {
    let (router, _) = routes().split_for_parts();
    router
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        // Each handler has its own limit. Uploads are not buffered, so they need none.
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn(e2b::mark_retries))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), authorize))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(
            e2b::cross_origin::layer(),
            e2b::cross_origin::allow,
        ))
        .layer(middleware::from_fn(trace))
        .with_state(app)
}

async fn no_route(method: Method, uri: Uri) -> Response {
    if e2b::has(uri.path()) {
        return e2b::no_route(&method, uri.path()).into_response();
    }
    ApiError::new(Code::NotFound, "no such route").into_response()
}

async fn no_method(method: Method, uri: Uri) -> Response {
    if e2b::has(uri.path()) {
        return e2b::no_method(&method, uri.path()).into_response();
    }
    ApiError::new(Code::InvalidRequest, "method not allowed on this route")
        .with_status(StatusCode::METHOD_NOT_ALLOWED)
        .into_response()
}

async fn authorize(State(app): State<AppState>, request: Request, next: Next) -> Response {
    if request.uri().path() == health::PATH || e2b::is_without_key(request.uri().path()) {
        return next.run(request).await;
    }
    let key = request
        .headers()
        .get(KEY_HEADER)
        .and_then(|value| value.to_str().ok());
    let refusal = match key {
        None => ApiError::new(Code::Unauthorized, "missing header `X-API-Key`"),
        Some(key) => match app.auth.accepts_key(key).await {
            Ok(true) => return next.run(request).await,
            Ok(false) => {
                let message = "invalid API key in the header `X-API-Key`";
                ApiError::new(Code::Unauthorized, message)
            }
            Err(error) => error.into(),
        },
    };
    if e2b::has(request.uri().path()) {
        return e2b::error::E2bError::from(refusal).into_response();
    }
    refusal.into_response()
}

/// Opens one span per request. Headers, query and body are never logged.
async fn trace(request: Request, next: Next) -> Response {
    let span =
        tracing::info_span!("request", method = %request.method(), path = request.uri().path());
    let begun = std::time::Instant::now();
    async move {
        let response = next.run(request).await;
        let elapsed_ms = begun.elapsed().as_millis();
        tracing::debug!(
            status = response.status().as_u16(),
            elapsed_ms,
            "request completed"
        );
        response
    }
    .instrument(span)
    .await
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the layer asks for a function of this form"
)]
fn panicked(cause: Box<dyn std::any::Any + Send + 'static>) -> Response {
    let text = cause
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| cause.downcast_ref::<&str>().copied());
    tracing::error!(cause = text, "handler panicked");
    let message = "internal server error; see the log of the control plane";
    ApiError::new(Code::Internal, message).into_response()
}
