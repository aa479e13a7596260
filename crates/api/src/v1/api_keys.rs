//! API keys.

use axum::{
    Json,
    extract::{Request, State},
};
use http::StatusCode;
use wrenn_api_types::{ApiKey, CreateApiKey, CreatedApiKey};
use wrenn_control::{api_key::KeyForm, principal::Principal};
use wrenn_db::ApiKey as Row;
use wrenn_model::{Scope, Scopes};

use crate::{
    app::AppState,
    error::{ApiError, Code},
    extract::{ApiJson, Caller, path_part},
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
    Caller(principal): Caller,
    ApiJson(request): ApiJson<CreateApiKey>,
) -> Result<(StatusCode, Json<CreatedApiKey>), ApiError> {
    validate::check_key_name(&request.name)?;
    let form = if request.e2b {
        KeyForm::E2b
    } else {
        KeyForm::Wrenn
    };
    let scopes = scopes(request.scopes, &principal)?;
    let made = app
        .auth
        .make(&principal.team, &request.name, form, scopes)
        .await?;
    let reply = CreatedApiKey {
        key: made.secret,
        api_key: made.row.into_rest(),
    };
    Ok((StatusCode::CREATED, Json(reply)))
}

/// Returns the scopes of a new key: those of the request, and at most those of its caller.
fn scopes(asked: Option<Vec<Scope>>, principal: &Principal) -> Result<Scopes, ApiError> {
    let Some(asked) = asked else {
        return Ok(principal.scopes.clone());
    };
    if asked.is_empty() {
        return Err(ApiError::field("scopes", "expected at least one scope"));
    }
    let asked: Scopes = asked.into_iter().collect();
    if !principal.scopes.include(&asked) {
        let why = format!("this API key has the scopes {} only", principal.scopes);
        return Err(ApiError::field("scopes", why));
    }
    Ok(asked)
}

/// Lists the API keys of the team, oldest first, without their secrets.
#[utoipa::path(
    get, path = "/v1/api-keys", tag = "api keys", operation_id = "list_api_keys",
    responses((status = 200, description = "The API keys.", body = [ApiKey]), CommonErrors)
)]
pub(super) async fn list(
    State(app): State<AppState>,
    Caller(principal): Caller,
) -> Result<Json<Vec<ApiKey>>, ApiError> {
    let rows = app.db.api_keys(&principal.team).await?;
    Ok(Json(rows.into_iter().map(Row::into_rest).collect()))
}

/// Deletes an API key.
///
/// The key stops working at once. The last key with the scope `keys` cannot be deleted (409
/// `conflict`).
#[utoipa::path(
    delete, path = "/v1/api-keys/{key_id}", tag = "api keys", operation_id = "delete_api_key",
    params(("key_id" = String, Path, description = "The key's `id`.")),
    responses((status = 204, description = "The API key was deleted."), CommonErrors, SandboxErrors)
)]
pub(super) async fn delete(
    State(app): State<AppState>,
    Caller(principal): Caller,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let (mut parts, _) = request.into_parts();
    let id = path_part(&mut parts, &app, "key_id").await?;
    if app.auth.delete(&principal.team, &id).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    let keys = app.db.api_keys(&principal.team).await?;
    if keys.iter().any(|key| key.id == id) {
        let message =
            "cannot delete the last API key with the scope `keys`; create another one first";
        return Err(ApiError::new(Code::Conflict, message));
    }
    Err(ApiError::new(Code::NotFound, "no such API key"))
}
