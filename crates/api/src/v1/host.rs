//! Host of this installation.

use axum::{Json, extract::State};
use wrenn_api_types::{BootCounts, ColdTemplate, Host, Isolation};

use crate::{
    app::AppState,
    error::ApiError,
    openapi::{CommonErrors, HostErrors},
};

/// Returns the host: its identity, its capacity and its boot counters.
#[utoipa::path(
    get, path = "/v1/host", tag = "server", operation_id = "get_host",
    responses((status = 200, description = "The host.", body = Host), CommonErrors, HostErrors)
)]
pub(super) async fn get(State(app): State<AppState>) -> Result<Json<Host>, ApiError> {
    let host = app.fleet.placement().agent.host().await?;
    let templates = host.templates.into_iter();
    let cold_templates = templates
        .filter(|template| !template.cold_boot_reason.is_empty())
        .map(|template| ColdTemplate {
            name: template.name,
            reason: template.cold_boot_reason,
        })
        .collect();
    Ok(Json(Host {
        id: host.host_id,
        installation_id: app.db.installation_id().await?,
        version: host.version,
        isolation: Isolation::of_accel(host.accel.clone()),
        accel: host.accel,
        vmm: host.vmm,
        cpu: host.cpu,
        cpu_count: host.cpu_count,
        memory_total_mb: host.memory_total_mib,
        memory_available_mb: host.memory_available_mib,
        memory_promised_mb: host.memory_promised_mib,
        memory_promise_limit_mb: host.memory_promise_limit_mib,
        disk_free_mb: host.disk_free_mib,
        sandboxes: host.sandboxes,
        boots: BootCounts {
            started: host.boots,
            retried: host.boots_retried,
            stalled: host.boots_stalled,
        },
        network_restored: host.network_restored,
        cold_templates,
    }))
}
