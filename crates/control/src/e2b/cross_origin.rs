//! Pages of elsewhere that use the E2B API from a browser: its SDK does. Each call shows its key, which no browser adds of its
//! own accord, so any page may ask. The `/v1` API has none of this.

use std::time::Duration;

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use http::{Method, header};
use tower::{Layer as _, ServiceExt as _};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::paging::NEXT_TOKEN;

/// How long a browser need not ask again: the most that any of them heeds.
const MAX_AGE: Duration = Duration::from_secs(2 * 3600);

/// What browsers are told.
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
        .expose_headers([NEXT_TOKEN])
        .max_age(MAX_AGE)
}

/// Tells them on this API's paths, and answers what they ask before a call: that comes without the call's key.
pub(crate) async fn allow(
    State(layer): State<CorsLayer>,
    request: Request,
    next: Next,
) -> Response {
    // The layer would answer every `OPTIONS`.
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
