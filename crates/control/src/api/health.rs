//! Whether the server is there.

use axum::{Json, extract::State};
use wrenn_proto::rest::Health;

use super::{AppState, error::ApiError, openapi::ServerErrors};

/// The only path that needs no key.
pub(super) const PATH: &str = "/health";

/// Whether the server and its database answer. Needs no key.
#[utoipa::path(
    get, path = "/health", tag = "server", security(()),
    responses((status = 200, description = "They do.", body = Health), ServerErrors)
)]
pub(super) async fn health(State(app): State<AppState>) -> Result<Json<Health>, ApiError> {
    app.db.ping().await?;
    Ok(Json(Health {
        status: "ok".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }))
}
