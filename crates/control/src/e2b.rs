//! The E2B API, for clients that nobody here wrote: the same sandboxes and templates as under `/v1`, in that API's words.
//!
//! Owns the routes, their bodies and answers, and what of that API differs: failures have its form (`error`), ids that cannot
//! be are not found, a sandbox has a deadline and not an idle time, and what has ended is not there any more. Never keeps
//! anything itself: `lifecycle` carries it out, rows remember.
//!
//! What is part of that API and not built answers 501 (`not_built`), so that no client takes silence for success.

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
mod not_built;
mod paging;
mod sandboxes;
mod templates;

use axum::{extract::Request, middleware::Next, response::Response};
use http::{HeaderValue, Method, StatusCode};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::api::AppState;
use error::E2bError;

/// Whether clients are told not to repeat a call that failed.
const SHOULD_RETRY: &str = "should-retry";

/// What the API's paths begin with.
const ROOTS: [&str; 9] = [
    "sandboxes",
    "v2",
    "v3",
    "snapshots",
    "templates",
    "volumes",
    "volumecontent",
    "secrets",
    "default-templates",
];

/// Whether a path is of this API.
pub(crate) fn has(path: &str) -> bool {
    let root = path.split('/').nth(1).unwrap_or_default();
    ROOTS.contains(&root)
}

/// Whether its clients bring no key of this server's: those of volumes have a token of the volume. As there are none, nothing is
/// behind these paths that a key would guard.
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

/// The answer where there is no route.
pub(crate) fn no_route(method: &Method, path: &str) -> E2bError {
    not_built::what(method, path).map_or_else(
        || E2bError::new(StatusCode::NOT_FOUND, "there is no such route"),
        E2bError::not_built,
    )
}

/// The answer where a route does not know the method.
pub(crate) fn no_method(method: &Method, path: &str) -> E2bError {
    not_built::what(method, path).map_or_else(
        || {
            let message = "this route does not know this method";
            E2bError::new(StatusCode::METHOD_NOT_ALLOWED, message)
        },
        E2bError::not_built,
    )
}

/// Tells clients which failed calls must not be repeated by themselves: those that, done twice, may have made two of something.
/// A create with an idempotency key makes one, however often it is sent.
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

/// Whether doing it twice is the same as doing it once. `named`: by an idempotency key, which creates heed.
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
