//! The E2B API, for unmodified E2B clients: the same sandboxes and templates as under `/v1`, with
//! the names and formats of that API.
//!
//! Owns the routes, their bodies and responses, and the differences of that API: errors have its
//! format (`error`), malformed ids are not found, a sandbox has a deadline instead of an idle time,
//! and a sandbox that has ended is not found. Never keeps state of its own: `lifecycle` carries out
//! the operations, and the rows hold the state.
//!
//! Unimplemented parts of the API answer 501 (`unimplemented`), so that no client mistakes a missing
//! feature for success.

mod create;
pub(crate) mod cross_origin;
pub(crate) mod error;
mod extract;
mod fork;
mod list;
mod metrics;
mod models;
mod names;
mod network;
mod paging;
mod sandboxes;
mod templates;
mod unimplemented;

use axum::{extract::Request, middleware::Next, response::Response};
use error::E2bError;
use http::{HeaderValue, Method, StatusCode};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::app::AppState;

/// Name of the header that tells clients not to repeat a failed call.
const SHOULD_RETRY: &str = "should-retry";

/// First path segments of the API.
const ROOTS: [&str; 15] = [
    "admin",
    "api-keys",
    "clusters",
    "events",
    "nodes",
    "sandboxes",
    "teams",
    "v2",
    "v3",
    "snapshots",
    "templates",
    "volumes",
    "volumecontent",
    "secrets",
    "default-templates",
];

/// True if a path belongs to this API.
pub(crate) fn has(path: &str) -> bool {
    let root = path.split('/').nth(1).unwrap_or_default();
    ROOTS.contains(&root)
}

/// True if clients of this path send no API key. Clients of volume content send a token of the
/// volume instead. Volumes are not implemented, so these paths expose nothing that a key would
/// protect.
pub(crate) fn is_without_key(path: &str) -> bool {
    path.split('/').nth(1) == Some("volumecontent")
}

/// All routes, with their documentation.
pub(crate) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create::create, list::list))
        .routes(routes!(create::create_v1, list::list_v1))
        .routes(routes!(sandboxes::get, sandboxes::kill))
        .routes(routes!(sandboxes::set_timeout))
        .routes(routes!(sandboxes::refresh))
        .routes(routes!(sandboxes::pause))
        .routes(routes!(sandboxes::resume))
        .routes(routes!(sandboxes::connect))
        .routes(routes!(sandboxes::connect_v1))
        .routes(routes!(network::update))
        .routes(routes!(metrics::get))
        .routes(routes!(metrics::get_many))
        .routes(routes!(fork::fork))
        .routes(routes!(templates::create_snapshot))
        .routes(routes!(templates::list_snapshots))
        .routes(routes!(templates::list))
        .routes(routes!(templates::list_v2))
        .routes(routes!(templates::alias))
        .routes(routes!(templates::delete))
}

/// Returns the error for a path without a route.
pub(crate) fn no_route(method: &Method, path: &str) -> E2bError {
    unimplemented::feature(method, path).map_or_else(
        || E2bError::new(StatusCode::NOT_FOUND, "no such route"),
        E2bError::unimplemented,
    )
}

/// Returns the error for a method that a route does not support.
pub(crate) fn no_method(method: &Method, path: &str) -> E2bError {
    unimplemented::feature(method, path).map_or_else(
        || {
            let message = "method not allowed on this route";
            E2bError::new(StatusCode::METHOD_NOT_ALLOWED, message)
        },
        E2bError::unimplemented,
    )
}

/// Marks failed calls that clients must not repeat automatically, because a repetition could create
/// a second resource. A create with an idempotency key creates one sandbox, however often it is
/// sent.
pub(crate) async fn mark_retries(request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let named = request.headers().contains_key(create::IDEMPOTENCY_KEY);
    let once = request.method() == Method::POST && has(path) && !may_be_repeated(path, named);
    let mut response = next.run(request).await;
    if once && (response.status().is_client_error() || response.status().is_server_error()) {
        let never = HeaderValue::from_static("false");
        response.headers_mut().insert(SHOULD_RETRY, never);
    }
    response
}

/// True if a repeated call has the same effect as a single one. `named` is true if the request has
/// an idempotency key, which creates honor.
fn may_be_repeated(path: &str, named: bool) -> bool {
    let harmless = ["/connect", "/timeout", "/refreshes"];
    (named && path.ends_with("/sandboxes")) || harmless.iter().any(|end| path.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_apis_do_not_share_a_path() {
        for path in [
            "/sandboxes",
            "/v2/sandboxes/x",
            "/templates/a%2Fb",
            "/v3/templates",
            "/volumes",
            "/teams",
            "/api-keys/x",
            "/events/webhooks",
            "/nodes",
            "/admin/x",
            "/clusters",
        ] {
            assert!(has(path), "{path}");
        }
        for path in [
            "/",
            "/health",
            "/v1/sandboxes",
            "/openapi.yaml",
            "/v1",
            "/sandboxesx",
        ] {
            assert!(!has(path), "{path}");
        }
    }
}
