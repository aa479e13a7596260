//! Pause, resume, fork: they go on whether their client waits or not.

use axum::{Json, extract::State};
use http::StatusCode;
use wrenn_proto::{
    SandboxId,
    rest::{ForkSandbox, Sandbox},
};

use super::{
    AppState,
    error::ApiError,
    extract::{ApiJsonOrEmpty, SandboxPath},
    openapi::{BodyErrors, CommonErrors, HostErrors, SandboxErrors},
    validate,
};
use crate::{
    db::sandboxes::Sandbox as Row,
    lifecycle::{CopyAs, LifecycleError},
};

/// Pauses a running sandbox: memory, processor and disk are saved, everything it has on its host but files is given back.
/// If that fails it runs on, its `warning` says why, and so does the answer. 409 unless it is `running`.
#[utoipa::path(
    post, path = "/{id}/pause", tag = "sandboxes", operation_id = "pause_sandbox",
    params(("id" = String, Path, description = "The sandbox.")),
    responses((status = 200, description = "The paused sandbox.", body = Sandbox), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn pause(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
) -> Result<Json<Sandbox>, ApiError> {
    let done = app.lifecycle.pause(&id, false).await;
    answer(&app, &id, done).await
}

/// Resumes a paused sandbox where it stood. If that fails it stays paused. 409 unless it is `paused`.
#[utoipa::path(
    post, path = "/{id}/resume", tag = "sandboxes", operation_id = "resume_sandbox",
    params(("id" = String, Path, description = "The sandbox.")),
    responses((status = 200, description = "The running sandbox.", body = Sandbox), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn resume(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
) -> Result<Json<Sandbox>, ApiError> {
    let done = app.lifecycle.resume(&id).await;
    answer(&app, &id, done).await
}

/// Makes copies of this very moment of a running sandbox, which goes on. All copies run when this answers, or none exists.
/// 409 unless it is `running`.
#[utoipa::path(
    post, path = "/{id}/fork", tag = "sandboxes", operation_id = "fork_sandbox", request_body = Option<ForkSandbox>,
    params(("id" = String, Path, description = "The sandbox.")),
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

/// The sandbox; or why not, and what it is now.
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
