//! What sandboxes are made from.

use axum::{Json, extract::State};
use wrenn_proto::rest::Template;

use super::{AppState, error::ApiError, openapi::CommonErrors, snapshots};

/// All templates, by name. While the host does not answer: those that it had.
#[utoipa::path(
    get, path = "/v1/templates", tag = "templates", operation_id = "list_templates",
    responses((status = 200, description = "The templates.", body = [Template]), CommonErrors)
)]
pub(super) async fn list(State(app): State<AppState>) -> Result<Json<Vec<Template>>, ApiError> {
    Ok(Json(snapshots::known(&app).await?))
}
