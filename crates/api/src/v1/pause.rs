//! Pause, resume and fork. These operations complete even if the client disconnects.

use axum::{Json, extract::State};
use http::StatusCode;
use wrenn_api_types::{ForkSandbox, ResumeSandbox, Sandbox};
use wrenn_control::lifecycle::{CopyAs, LifecycleError};
use wrenn_db::Sandbox as Row;
use wrenn_model::SandboxId;

use crate::{
    app::AppState,
    error::ApiError,
    extract::{ApiJsonOrEmpty, SandboxPath},
    openapi::{BodyErrors, CommonErrors, HostErrors, SandboxErrors},
    records::IntoRest as _,
    validate,
};

/// Pauses a running sandbox.
///
/// Memory, processor state and disk are saved. All resources on the host except files are released.
/// If the pause fails, the sandbox keeps running, and both the response and the sandbox's `warning`
/// give the reason. Fails with 409 unless the sandbox is `running`.
#[utoipa::path(
    post, path = "/{id}/pause", tag = "sandboxes", operation_id = "pause_sandbox",
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 200, description = "The paused sandbox.", body = Sandbox), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn pause(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
) -> Result<Json<Sandbox>, ApiError> {
    let done = app.lifecycle.pause(&id, false).await;
    answer(&app, &id, done).await
}

/// Resumes a paused sandbox from its saved state.
///
/// If the resume fails, the sandbox stays paused. Fails with 409 unless the sandbox is `paused`,
/// and if the host's virtual machine monitor cannot load the saved memory: with `memory` false, the
/// sandbox then boots from its disk.
#[utoipa::path(
    post, path = "/{id}/resume", tag = "sandboxes", operation_id = "resume_sandbox", request_body = Option<ResumeSandbox>,
    params(("id" = String, Path, description = "Sandbox id.")),
    responses(
        (status = 200, description = "The running sandbox.", body = Sandbox),
        CommonErrors, BodyErrors, SandboxErrors, HostErrors
    )
)]
pub(super) async fn resume(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ApiJsonOrEmpty(request): ApiJsonOrEmpty<ResumeSandbox>,
) -> Result<Json<Sandbox>, ApiError> {
    let disk_only = request.memory == Some(false);
    let done = app.lifecycle.resume(&id, disk_only).await;
    answer(&app, &id, done).await
}

/// Forks a running sandbox; the original keeps running.
///
/// Either all copies run when the call returns, or none exists. Fails with 409 unless the sandbox
/// is `running`.
#[utoipa::path(
    post, path = "/{id}/fork", tag = "sandboxes", operation_id = "fork_sandbox", request_body = Option<ForkSandbox>,
    params(("id" = String, Path, description = "Sandbox id.")),
    responses(
        (status = 201, description = "The copies.", body = [Sandbox]),
        CommonErrors, BodyErrors, SandboxErrors, HostErrors
    )
)]
pub(super) async fn fork(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ApiJsonOrEmpty(request): ApiJsonOrEmpty<ForkSandbox>,
) -> Result<(StatusCode, Json<Vec<Sandbox>>), ApiError> {
    let count = validate::fork_count(&request)?;
    let copies = app.lifecycle.fork(&id, count, CopyAs::Source).await?;
    let copies = copies.into_iter().map(Row::into_rest).collect();
    Ok((StatusCode::CREATED, Json(copies)))
}

/// Returns the sandbox, or an error. An error of the host is extended by the sandbox's current
/// status.
async fn answer(
    app: &AppState,
    id: &SandboxId,
    done: Result<Row, LifecycleError>,
) -> Result<Json<Sandbox>, ApiError> {
    let error = match done {
        Ok(row) => return Ok(Json(row.into_rest())),
        Err(error) => error,
    };
    let by_host = matches!(error, LifecycleError::Agent(_));
    let mut error = ApiError::from(error);
    if by_host && let Ok(row) = app.lifecycle.get(id).await {
        error.message = format!("{}; sandbox `{id}` is now `{}`", error.message, row.status);
    }
    Err(error)
}
