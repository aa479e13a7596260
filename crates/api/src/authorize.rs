//! Check of the API key, before the route and before any upgrade.

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};

use crate::{
    app::AppState,
    e2b,
    error::{ApiError, Code},
    v1,
};

/// Name of the header that carries the API key.
const KEY_HEADER: &str = "x-api-key";

/// Lets a request pass if its key is valid, or if its path needs none.
pub(crate) async fn authorize(
    State(app): State<AppState>,
    request: Request,
    next: Next,
) -> Response {
    if request.uri().path() == v1::HEALTH_PATH || e2b::is_without_key(request.uri().path()) {
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
