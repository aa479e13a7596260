//! Single sandboxes: details, deadline, pause, kill and connect.

use std::time::Duration;

use axum::{Json, extract::State};
use http::StatusCode;
use serde::Deserialize;
use utoipa::ToSchema;
use wrenn_control::lifecycle::{Connected, Connection, LifecycleError};
use wrenn_db::Sandbox as Row;
use wrenn_model::{OnTimeout, SandboxId, SandboxStatus, limits};

use super::{
    create::lifetime,
    error::{E2bConflict, E2bError, E2bErrors, E2bNotFound, has_ended},
    extract::{E2bJson, E2bSandboxPath},
    models::{E2bSandbox, E2bSandboxDetail, E2bState, Version},
};
use crate::app::AppState;

/// Default lifetime of a connect, in seconds.
const DEFAULT_CONNECT_SEC: u32 = 300;

/// Default lifetime of the older resume call, in seconds.
const DEFAULT_RESUME_SEC: u32 = 15;

/// Maximum seconds that a refresh adds.
const MAX_REFRESH_SEC: i64 = 3600;

/// Maximum response time of a healthy guest agent.
const HEALTHY_WITHIN: Duration = Duration::from_secs(5);

/// Returns the row of a sandbox that is visible to clients of this API.
pub(super) async fn visible(app: &AppState, id: &SandboxId) -> Result<(Row, E2bState), E2bError> {
    let row = app.lifecycle.get(id).await?;
    let state = E2bState::of(row.status).ok_or_else(|| E2bError::no_sandbox(id))?;
    Ok((row, state))
}

/// Returns one sandbox.
///
/// A sandbox that has ended is not found.
#[utoipa::path(
    get, path = "/sandboxes/{id}", tag = "e2b", operation_id = "e2b_get_sandbox",
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 200, description = "The sandbox.", body = E2bSandboxDetail), E2bErrors, E2bNotFound)
)]
pub(super) async fn get(
    State(app): State<AppState>,
    E2bSandboxPath(id): E2bSandboxPath,
) -> Result<Json<E2bSandboxDetail>, E2bError> {
    let (row, state) = visible(&app, &id).await?;
    Ok(Json(E2bSandboxDetail::of(&row, state)))
}

/// Destroys a sandbox in any state.
///
/// A sandbox that has ended is not found.
#[utoipa::path(
    delete, path = "/sandboxes/{id}", tag = "e2b", operation_id = "e2b_kill_sandbox",
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 204, description = "The sandbox was destroyed."), E2bErrors, E2bNotFound)
)]
pub(super) async fn kill(
    State(app): State<AppState>,
    E2bSandboxPath(id): E2bSandboxPath,
) -> Result<StatusCode, E2bError> {
    let row = app.lifecycle.get(&id).await?;
    if matches!(row.status, SandboxStatus::Stopped | SandboxStatus::Error) {
        return Err(E2bError::no_sandbox(&id));
    }
    app.lifecycle.destroy(&id, "").await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Body of a timeout request.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct E2bTimeout {
    /// Seconds from now until the deadline. 0 ends the sandbox at once.
    timeout: Option<i64>,
}

/// Sets the deadline of a running sandbox, earlier or later.
#[utoipa::path(
    post, path = "/sandboxes/{id}/timeout", tag = "e2b", operation_id = "e2b_set_timeout", request_body = E2bTimeout,
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 204, description = "The deadline was set."), E2bErrors, E2bNotFound)
)]
pub(super) async fn set_timeout(
    State(app): State<AppState>,
    E2bSandboxPath(id): E2bSandboxPath,
    E2bJson(request): E2bJson<E2bTimeout>,
) -> Result<StatusCode, E2bError> {
    let seconds = match request.timeout {
        None => return Err(E2bError::field("timeout", "is required")),
        Some(0) => 0,
        asked => lifetime("timeout", asked, 0, app.limits.max_lifetime_sec)?,
    };
    app.lifecycle
        .set_lifetime(&id, seconds)
        .await
        .map_err(not_running)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Body of a refresh request.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct E2bRefresh {
    /// Seconds from now, 0 to 3600. Default: 15.
    duration: Option<i64>,
}

/// Extends the deadline of a running sandbox.
///
/// The deadline is never moved to an earlier time.
#[utoipa::path(
    post, path = "/sandboxes/{id}/refreshes", tag = "e2b", operation_id = "e2b_refresh", request_body = E2bRefresh,
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 204, description = "The deadline was set."), E2bErrors, E2bNotFound)
)]
pub(super) async fn refresh(
    State(app): State<AppState>,
    E2bSandboxPath(id): E2bSandboxPath,
    E2bJson(request): E2bJson<E2bRefresh>,
) -> Result<StatusCode, E2bError> {
    let seconds = request.duration.unwrap_or(i64::from(DEFAULT_RESUME_SEC));
    if !(0..=MAX_REFRESH_SEC).contains(&seconds) {
        let why = format!("expected 0 to {MAX_REFRESH_SEC} seconds");
        return Err(E2bError::field("duration", why));
    }
    let seconds = u32::try_from(seconds).unwrap_or(limits::MAX_TIMEOUT_SEC);
    app.lifecycle
        .extend(&id, seconds)
        .await
        .map_err(not_running)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Converts an error. Only running sandboxes have a deadline, so a paused one is reported as not
/// found.
fn not_running(error: LifecycleError) -> E2bError {
    let mut told = E2bError::from(error);
    if told.status == StatusCode::CONFLICT {
        told.status = StatusCode::NOT_FOUND;
    }
    told
}

/// Body of a pause request.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct E2bPause {
    /// `false`: keep the disk only; the resume boots the sandbox. Default: true.
    memory: Option<bool>,
    /// Fail if the guest agent does not answer. Default: false.
    require_healthy_guest: Option<bool>,
}

/// Pauses a running sandbox.
///
/// Fails with 409 if the sandbox is already paused.
#[utoipa::path(
    post, path = "/sandboxes/{id}/pause", tag = "e2b", operation_id = "e2b_pause_sandbox", request_body = Option<E2bPause>,
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 204, description = "The sandbox was paused."), E2bErrors, E2bNotFound, E2bConflict)
)]
pub(super) async fn pause(
    State(app): State<AppState>,
    E2bSandboxPath(id): E2bSandboxPath,
    E2bJson(request): E2bJson<E2bPause>,
) -> Result<StatusCode, E2bError> {
    if request.require_healthy_guest == Some(true) {
        require_healthy(&app, &id).await?;
    }
    let disk_only = request.memory == Some(false);
    app.lifecycle.pause(&id, disk_only).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Checks that the guest agent answers, by a call that only the guest agent can answer.
async fn require_healthy(app: &AppState, id: &SandboxId) -> Result<(), E2bError> {
    let row = app.lifecycle.get(id).await?;
    if row.status != SandboxStatus::Running {
        // The pause reports the wrong status.
        return Ok(());
    }
    let host = app.lifecycle.host_of(&row).await?;
    match tokio::time::timeout(HEALTHY_WITHIN, host.agent.metrics(id.as_str())).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => {
            tracing::info!(sandbox_id = %id, %error, "guest agent health check failed");
            Err(E2bError::guest_unresponsive(id))
        }
        Err(_) => Err(E2bError::guest_unresponsive(id)),
    }
}

/// Body of a connect request.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct E2bConnect {
    /// Minimum seconds from now until the deadline. Default: 300.
    timeout: Option<i64>,
    /// `false`: boot a paused sandbox from its disk. Default: true.
    memory: Option<bool>,
}

impl E2bConnect {
    fn checked(&self, app: &AppState, default: u32) -> Result<Connection, E2bError> {
        Ok(Connection {
            lifetime_sec: match self.timeout {
                Some(0) => 0,
                asked => lifetime("timeout", asked, default, app.limits.max_lifetime_sec)?,
            },
            disk_only: self.memory == Some(false),
        })
    }
}

/// Connects to a sandbox, resuming it if it is paused.
///
/// A running sandbox lives at least for the given time (200). A paused one is resumed (201).
#[utoipa::path(
    post, path = "/v2/sandboxes/{id}/connect", tag = "e2b", operation_id = "e2b_connect_sandbox",
    request_body = Option<E2bConnect>, params(("id" = String, Path, description = "Sandbox id.")),
    responses(
        (status = 200, description = "The sandbox was running.", body = E2bSandbox),
        (status = 201, description = "The sandbox was paused and has been resumed.", body = E2bSandbox),
        E2bErrors, E2bNotFound, E2bConflict
    )
)]
pub(super) async fn connect(
    State(app): State<AppState>,
    E2bSandboxPath(id): E2bSandboxPath,
    E2bJson(request): E2bJson<E2bConnect>,
) -> Result<(StatusCode, Json<E2bSandbox>), E2bError> {
    let wanted = request.checked(&app, DEFAULT_CONNECT_SEC)?;
    connect_as(&app, &id, wanted, Version::V2).await
}

/// Connects to a sandbox, resuming it if it is paused (version 1).
///
/// As in version 2, but the response contains no token if the sandbox requires none.
#[utoipa::path(
    post, path = "/sandboxes/{id}/connect", tag = "e2b", operation_id = "e2b_connect_sandbox_v1",
    request_body = E2bConnect, params(("id" = String, Path, description = "Sandbox id.")),
    responses(
        (status = 200, description = "The sandbox was running.", body = E2bSandbox),
        (status = 201, description = "The sandbox was paused and has been resumed.", body = E2bSandbox),
        E2bErrors, E2bNotFound, E2bConflict
    )
)]
pub(super) async fn connect_v1(
    State(app): State<AppState>,
    E2bSandboxPath(id): E2bSandboxPath,
    E2bJson(request): E2bJson<E2bConnect>,
) -> Result<(StatusCode, Json<E2bSandbox>), E2bError> {
    let wanted = request.checked(&app, DEFAULT_CONNECT_SEC)?;
    connect_as(&app, &id, wanted, Version::V1).await
}

async fn connect_as(
    app: &AppState,
    id: &SandboxId,
    wanted: Connection,
    version: Version,
) -> Result<(StatusCode, Json<E2bSandbox>), E2bError> {
    let told = |status, row: &Row| Ok((status, Json(E2bSandbox::of(row, version))));
    match app.lifecycle.connect(id, wanted).await {
        Ok(Connected::Found(row)) => told(StatusCode::OK, &row),
        Ok(Connected::Resumed(row)) => told(StatusCode::CREATED, &row),
        Err(LifecycleError::WrongStatus {
            status: SandboxStatus::Stopping,
            ..
        }) => {
            let message = format!("the sandbox `{id}` is being killed");
            Err(E2bError::new(StatusCode::CONFLICT, message))
        }
        Err(error) => Err(error.into()),
    }
}

/// Body of a resume request.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct E2bResume {
    #[serde(flatten)]
    connect: E2bConnect,
    /// From now on, pause the sandbox at its deadline instead of destroying it.
    auto_pause: Option<bool>,
}

/// Resumes a paused sandbox. Older form of `connect`.
///
/// Fails with 409 if the sandbox is running.
#[utoipa::path(
    post, path = "/sandboxes/{id}/resume", tag = "e2b", operation_id = "e2b_resume_sandbox", request_body = Option<E2bResume>,
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 201, description = "The sandbox was resumed.", body = E2bSandbox), E2bErrors, E2bNotFound, E2bConflict)
)]
pub(super) async fn resume(
    State(app): State<AppState>,
    E2bSandboxPath(id): E2bSandboxPath,
    E2bJson(request): E2bJson<E2bResume>,
) -> Result<(StatusCode, Json<E2bSandbox>), E2bError> {
    let wanted = request.connect.checked(&app, DEFAULT_RESUME_SEC)?;
    let running = || {
        let message = format!("the sandbox `{id}` is already running");
        E2bError::new(StatusCode::CONFLICT, message)
    };
    let row = app.lifecycle.get(&id).await?;
    if has_ended(row.status) {
        return Err(E2bError::no_sandbox(&id));
    }
    if row.status == SandboxStatus::Running {
        return Err(running());
    }
    let Connected::Resumed(mut row) = app.lifecycle.connect(&id, wanted).await? else {
        return Err(running());
    };
    if let Some(auto_pause) = request.auto_pause {
        let on_timeout = if auto_pause {
            OnTimeout::Pause
        } else {
            OnTimeout::Kill
        };
        let change = app.lifecycle.change(&id, |row| row.on_timeout = on_timeout);
        row = change.await?;
    }
    Ok((StatusCode::CREATED, Json(E2bSandbox::of(&row, Version::V1))))
}
