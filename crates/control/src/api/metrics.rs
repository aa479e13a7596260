//! How much of itself a sandbox uses now.

use axum::{Json, extract::State};
use wrenn_proto::rest::Metrics;

use super::{
    AppState,
    error::ApiError,
    extract::SandboxPath,
    openapi::{CommonErrors, HostErrors, SandboxErrors},
};

/// What a running sandbox uses, as its own kernel counts. Does not count as use, but resumes a paused one that was created so.
#[utoipa::path(
    get, path = "/{id}/metrics", tag = "sandboxes", operation_id = "get_metrics",
    params(("id" = String, Path, description = "The sandbox.")),
    responses((status = 200, description = "The numbers.", body = Metrics), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn get(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
) -> Result<Json<Metrics>, ApiError> {
    app.lifecycle.require_running(&id).await?;
    let now = app.agent.metrics(id.as_str()).await?;
    Ok(Json(Metrics {
        sandbox_id: id.into(),
        timestamp_unix: now.timestamp_unix_ms.div_euclid(1000),
        cpu_count: now.cpu_count,
        cpu_pct: now.cpu_used_pct,
        mem_bytes: now.mem_used_bytes,
        mem_total_bytes: now.mem_total_bytes,
        disk_bytes: now.disk_used_bytes,
        disk_total_bytes: now.disk_total_bytes,
    }))
}
