//! API keys.

use axum::{
    Json,
    extract::{Request, State},
};
use http::StatusCode;
use wrenn_api_types::{ApiKey, CreateApiKey, CreatedApiKey};
use wrenn_control::api_key::KeyForm;
use wrenn_db::ApiKey as Row;

use crate::{
    app::AppState,
    error::{ApiError, Code},
    extract::{ApiJson, path_part},
    openapi::{BodyErrors, CommonErrors, SandboxErrors},
    records::IntoRest as _,
    validate,
};

/// Creates an API key.
///
/// The secret is returned in this response only.
#[utoipa::path(
    post, path = "/v1/api-keys", tag = "api keys", operation_id = "create_api_key", request_body = CreateApiKey,
    responses((status = 201, description = "The new API key.", body = CreatedApiKey), CommonErrors, BodyErrors)
)]
pub(super) async fn create(
    State(app): State<AppState>,
    ApiJson(request): ApiJson<CreateApiKey>,
) -> Result<(StatusCode, Json<CreatedApiKey>), ApiError> {
    validate::check_key_name(&request.name)?;
    let form = if request.e2b {
        KeyForm::E2b
    } else {
        KeyForm::Wrenn
    };
    let made = app.auth.make(&request.name, form).await?;
    let reply = CreatedApiKey {
        key: made.secret,
        api_key: made.row.into_rest(),
    };
    Ok((StatusCode::CREATED, Json(reply)))
}

/// Lists all API keys, oldest first, without their secrets.
#[utoipa::path(
    get, path = "/v1/api-keys", tag = "api keys", operation_id = "list_api_keys",
    responses((status = 200, description = "The API keys.", body = [ApiKey]), CommonErrors)
)]
pub(super) async fn list(State(app): State<AppState>) -> Result<Json<Vec<ApiKey>>, ApiError> {
    let rows = app.db.api_keys().await?;
    Ok(Json(rows.into_iter().map(Row::into_rest).collect()))
}

/// Deletes an API key.
///
/// The key stops working at once. The last key cannot be deleted (409 `conflict`).
#[utoipa::path(
    delete, path = "/v1/api-keys/{key_id}", tag = "api keys", operation_id = "delete_api_key",
    params(("key_id" = String, Path, description = "The key's `id`.")),
    responses((status = 204, description = "The API key was deleted."), CommonErrors, SandboxErrors)
)]
pub(super) async fn delete(
    State(app): State<AppState>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let (mut parts, _) = request.into_parts();
    let id = path_part(&mut parts, &app, "key_id").await?;
    if app.auth.delete(&id).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    if app.db.api_keys().await?.iter().any(|key| key.id == id) {
        let message = "cannot delete the last API key; create another one first";
        return Err(ApiError::new(Code::Conflict, message));
    }
    Err(ApiError::new(Code::NotFound, "no such API key"))
}
