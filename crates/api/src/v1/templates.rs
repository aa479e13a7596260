//! Templates, from which sandboxes are created.

use axum::{Json, extract::State};
use wrenn_api_types::Template;

use crate::{app::AppState, error::ApiError, openapi::CommonErrors, templates};

/// Lists all templates by name.
///
/// If the host does not answer, returns the templates that it last reported.
#[utoipa::path(
    get, path = "/v1/templates", tag = "templates", operation_id = "list_templates",
    responses((status = 200, description = "The templates.", body = [Template]), CommonErrors)
)]
pub(super) async fn list(State(app): State<AppState>) -> Result<Json<Vec<Template>>, ApiError> {
    Ok(Json(templates::known(&app).await?))
}
