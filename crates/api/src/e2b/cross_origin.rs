//! Cross-origin requests (CORS) to the E2B API. Its JavaScript SDK also runs in browsers.
//!
//! Pages of any origin may call the API: each call needs the API key in a header, which no browser
//! adds by itself. The `/v1` API allows no cross-origin requests.

use std::time::Duration;

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use http::{Method, header};
use tower::{Layer as _, ServiceExt as _};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::paging::{NEXT_TOKEN, TOTAL_RUNNING};

/// Lifetime of a cached preflight response: the longest that any browser honors.
const MAX_AGE: Duration = Duration::from_secs(2 * 3600);

/// Returns the CORS layer.
pub(crate) fn layer() -> CorsLayer {
    CorsLayer::new()
        .allow_origin(AllowOrigin::any())
        .allow_methods([
            Method::GET,
            Method::HEAD,
            Method::POST,
            Method::PUT,
            Method::PATCH,
            Method::DELETE,
        ])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([NEXT_TOKEN, TOTAL_RUNNING])
        .max_age(MAX_AGE)
}

/// Adds CORS headers to responses of this API and answers preflight requests, which carry no API
/// key.
pub(crate) async fn allow(
    State(layer): State<CorsLayer>,
    request: Request,
    next: Next,
) -> Response {
    // The layer would answer every `OPTIONS` request.
    let is_other = request.method() == Method::OPTIONS
        && !request
            .headers()
            .contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    if is_other || !super::has(request.uri().path()) {
        return next.run(request).await;
    }
    let Ok(response) = layer.layer(next).oneshot(request).await;
    response
}
