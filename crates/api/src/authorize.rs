//! Check of the API key, before the route and before any upgrade.

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::HeaderMap;
use wrenn_control::principal::Principal;
use wrenn_model::Scope;

use crate::{
    app::{App, AppState},
    e2b,
    error::{ApiError, Code},
    v1,
};

/// Name of the header that carries the API key.
const KEY_HEADER: &str = "x-api-key";

/// Lets a request pass if its key is valid and has the scope of the route, or if its path needs no
/// key. Hands the [`Principal`] on to the route.
pub(crate) async fn authorize(
    State(app): State<AppState>,
    mut request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    if path == v1::HEALTH_PATH || e2b::is_without_key(path) {
        return next.run(request).await;
    }
    match principal(&app, path, request.headers()).await {
        Ok(principal) => {
            request.extensions_mut().insert(principal);
            next.run(request).await
        }
        Err(refusal) if e2b::has(path) => e2b::error::E2bError::from(refusal).into_response(),
        Err(refusal) => refusal.into_response(),
    }
}

/// Returns the caller of a path.
async fn principal(app: &App, path: &str, headers: &HeaderMap) -> Result<Principal, ApiError> {
    let key = headers
        .get(KEY_HEADER)
        .and_then(|value| value.to_str().ok());
    let Some(key) = key else {
        let message = "missing header `X-API-Key`";
        return Err(ApiError::new(Code::Unauthorized, message));
    };
    let Some(principal) = app.auth.identify(key).await? else {
        let message = "invalid API key in the header `X-API-Key`";
        return Err(ApiError::new(Code::Unauthorized, message));
    };
    let scope = scope_of(path);
    if !principal.scopes.contains(scope) {
        let message = format!(
            "this API key does not have the scope `{}` that the route requires",
            scope.as_str()
        );
        return Err(ApiError::new(Code::Forbidden, message));
    }
    Ok(principal)
}

/// Returns the scope that a key needs for a path.
fn scope_of(path: &str) -> Scope {
    let is_below = |root: &str| {
        path.strip_prefix(root)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if is_below("/v1/api-keys") {
        return Scope::Keys;
    }
    if is_below("/v1/host") || is_below("/v1/unknown-sandboxes") {
        return Scope::Hosts;
    }
    Scope::Sandboxes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_that_administer_need_their_own_scope() {
        for (path, scope) in [
            ("/v1/api-keys", Scope::Keys),
            ("/v1/api-keys/1", Scope::Keys),
            ("/v1/host", Scope::Hosts),
            ("/v1/host/sandboxes/sb-1/log", Scope::Hosts),
            ("/v1/unknown-sandboxes/sb-1/adopt", Scope::Hosts),
            ("/v1/hosts", Scope::Sandboxes),
            ("/v1/sandboxes", Scope::Sandboxes),
            ("/sandboxes", Scope::Sandboxes),
            ("/openapi.json", Scope::Sandboxes),
        ] {
            assert_eq!(scope_of(path), scope, "{path}");
        }
    }
}
