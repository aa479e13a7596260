//! Sandboxes that the host has and the database does not know.

use axum::{Json, extract::State};
use http::StatusCode;
use wrenn_proto::{
    rest::{Sandbox, UnknownSandbox},
    rpc::hostagent::v1::{SandboxInfo, SandboxState},
};

use super::{
    AppState,
    error::ApiError,
    extract::SandboxPath,
    openapi::{CommonErrors, HostErrors, SandboxErrors},
};
use crate::clock;

/// Lists sandboxes that run on the host and are not in the database.
///
/// An empty, restored or mistyped database does not know the sandboxes of the right one. They keep
/// running until they are adopted or destroyed by the calls below.
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

/// Adds a sandbox that runs on the host to the database.
///
/// Its metadata and its settings for the end of the idle timeout are the defaults: only the
/// database that created the sandbox knows them.
#[utoipa::path(
    post, path = "/v1/unknown-sandboxes/{id}/adopt", tag = "sandboxes",
    operation_id = "adopt_sandbox", params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 200, description = "The sandbox.", body = Sandbox),
        CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn adopt(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
) -> Result<Json<Sandbox>, ApiError> {
    Ok(Json(app.lifecycle.adopt(&id).await?.into_rest()))
}

/// Destroys a sandbox that runs on the host and is not in the database.
#[utoipa::path(
    delete, path = "/v1/unknown-sandboxes/{id}", tag = "sandboxes",
    operation_id = "destroy_unknown_sandbox",
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 204, description = "The sandbox was destroyed."),
        CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn destroy(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
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
