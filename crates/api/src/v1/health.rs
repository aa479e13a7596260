//! Health check of the server.

use axum::{Json, extract::State};
use wrenn_api_types::{Health, Isolation};

use crate::{app::AppState, error::ApiError, openapi::ServerErrors};

/// Path of the health check, the only implemented route that needs no API key.
pub(crate) const PATH: &str = "/health";

/// Checks that the server and its database respond.
///
/// Needs no API key.
#[utoipa::path(
    get, path = "/health", tag = "server", security(()),
    responses((status = 200, description = "The server and its database respond.", body = Health), ServerErrors)
)]
pub(super) async fn health(State(app): State<AppState>) -> Result<Json<Health>, ApiError> {
    app.db.ping().await?;
    Ok(Json(Health {
        status: "ok".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        isolation: Isolation::of_accel(app.host.accel().await),
    }))
}
