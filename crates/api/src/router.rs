//! The REST API: routes and the middleware that every request passes through.
//!
//! Owns the order of the middleware, and the answers to requests without a route. Never decides
//! about the life of a sandbox (`wrenn_control::lifecycle` does), and never buffers a whole file or
//! a whole output unless the caller requested it in one piece.
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

use std::sync::Arc;

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use http::{Method, StatusCode, Uri};
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument as _;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    app::AppState,
    authorize::authorize,
    e2b,
    error::{ApiError, Code},
    openapi, v1,
};

/// All routes, with their documentation.
pub(crate) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::with_openapi(openapi::base())
        .routes(routes!(openapi::document))
        .merge(v1::routes())
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
