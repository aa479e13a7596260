//! Unknown sandboxes: sandboxes that exist on the host and are not in the database.

use axum::{Json, extract::State};
use http::StatusCode;
use wrenn_api_types::{Sandbox, UnknownSandbox};
use wrenn_control::clock;
use wrenn_proto::rpc::hostagent::v1::{SandboxInfo, SandboxState};

use crate::{
    app::AppState,
    error::ApiError,
    extract::{Caller, UnknownSandboxPath},
    openapi::{CommonErrors, HostErrors, SandboxErrors},
    records::IntoRest as _,
};

/// Lists sandboxes that exist on the host and are not in the database.
///
/// This happens if the control plane was started with another, an empty or a restored database. The
/// sandboxes are left unchanged until a client adopts or destroys them.
#[utoipa::path(
    get, path = "/v1/unknown-sandboxes", tag = "sandboxes", operation_id = "list_unknown_sandboxes",
    responses((status = 200, description = "The sandboxes, by id.", body = [UnknownSandbox]),
        CommonErrors, HostErrors)
)]
pub(super) async fn list(
    State(app): State<AppState>,
) -> Result<Json<Vec<UnknownSandbox>>, ApiError> {
    let unknown = app.lifecycle.unknown().await?;
    Ok(Json(unknown.into_iter().map(shown).collect()))
}

/// Adds a sandbox that exists on the host to the database. It then belongs to the team of the API
/// key.
///
/// The sandbox gets no metadata, `on_timeout` `pause`, `auto_resume` false and no deadline, because
/// these settings are only in the database with which it was created. Fails with 409 `conflict` if
/// the sandbox is already in the database, or is neither starting, running nor paused.
#[utoipa::path(
    post, path = "/v1/unknown-sandboxes/{id}/adopt", tag = "sandboxes",
    operation_id = "adopt_sandbox", params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 200, description = "The sandbox.", body = Sandbox),
        CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn adopt(
    State(app): State<AppState>,
    Caller(principal): Caller,
    UnknownSandboxPath(id): UnknownSandboxPath,
) -> Result<Json<Sandbox>, ApiError> {
    let adopted = app.lifecycle.adopt(&principal.team, &id).await?;
    Ok(Json(adopted.into_rest()))
}

/// Destroys a sandbox that exists on the host and is not in the database.
///
/// Fails with 409 `conflict` if the sandbox is in the database.
#[utoipa::path(
    delete, path = "/v1/unknown-sandboxes/{id}", tag = "sandboxes",
    operation_id = "destroy_unknown_sandbox",
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 204, description = "The sandbox was destroyed."),
        CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn destroy(
    State(app): State<AppState>,
    UnknownSandboxPath(id): UnknownSandboxPath,
) -> Result<StatusCode, ApiError> {
    app.lifecycle.destroy_unknown(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn shown(info: SandboxInfo) -> UnknownSandbox {
    let state = match info.state.as_known() {
        Some(SandboxState::SANDBOX_STATE_STARTING) => "starting",
        Some(SandboxState::SANDBOX_STATE_RUNNING) => "running",
        Some(SandboxState::SANDBOX_STATE_PAUSING) => "pausing",
        Some(SandboxState::SANDBOX_STATE_PAUSED) => "paused",
        Some(SandboxState::SANDBOX_STATE_RESUMING) => "resuming",
        Some(SandboxState::SANDBOX_STATE_STOPPING) => "stopping",
        Some(SandboxState::SANDBOX_STATE_ERROR | SandboxState::SANDBOX_STATE_UNSPECIFIED)
        | None => "error",
    };
    UnknownSandbox {
        id: info.id,
        state: state.to_owned(),
        template: info.template,
        vcpus: info.vcpus,
        memory_mb: info.memory_mb,
        installation_id: (!info.installation_id.is_empty()).then_some(info.installation_id),
        created_at: clock::timestamp(info.created_unix_ms),
    }
}
