//! Forks of a running sandbox.

use axum::{Json, extract::State};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wrenn_control::lifecycle::CopyAs;
use wrenn_model::{SandboxStatus, limits};

use super::{
    create::lifetime,
    error::{E2bConflict, E2bError, E2bErrorBody, E2bErrors, E2bNotFound},
    extract::{E2bJson, E2bSandboxPath},
    models::{E2bSandbox, Version},
};
use crate::app::AppState;

/// Default lifetime of a copy, in seconds.
const DEFAULT_TIMEOUT_SEC: u32 = 15;

/// Body of a fork request.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct E2bFork {
    /// Seconds until the deadline of the copies. Default: 15.
    timeout: Option<i64>,
    /// Number of copies, 1 to 100. Default: 1.
    count: Option<i64>,
}

/// One copy, or the reason for which it does not exist.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum E2bForked {
    Sandbox(E2bSandbox),
    Error(E2bErrorBody),
}

/// Forks a running sandbox; the original keeps running.
///
/// Each copy has its own token and its own deadline.
#[utoipa::path(
    post, path = "/sandboxes/{id}/fork", tag = "e2b", operation_id = "e2b_fork_sandbox", request_body = Option<E2bFork>,
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 201, description = "The copies.", body = [E2bForked]), E2bErrors, E2bNotFound, E2bConflict)
)]
pub(super) async fn fork(
    State(app): State<AppState>,
    E2bSandboxPath(id): E2bSandboxPath,
    E2bJson(request): E2bJson<E2bFork>,
) -> Result<(StatusCode, Json<Vec<E2bForked>>), E2bError> {
    let max_sec = app.limits.max_lifetime_sec;
    let lifetime_sec = lifetime("timeout", request.timeout, DEFAULT_TIMEOUT_SEC, max_sec)?;
    let count = u32::try_from(request.count.unwrap_or(1))
        .ok()
        .filter(|count| (1..=limits::MAX_FORK_COPIES).contains(count))
        .ok_or_else(|| {
            let why = format!("expected 1 to {}", limits::MAX_FORK_COPIES);
            E2bError::field("count", why)
        })?;
    let copy_as = CopyAs::Lifetime { lifetime_sec };
    let copies = app.lifecycle.fork(&id, count, copy_as).await?;
    let forked = copies.iter().map(|copy| match copy.status {
        SandboxStatus::Running => E2bForked::Sandbox(E2bSandbox::of(copy, Version::V1)),
        _ => E2bForked::Error(E2bError::no_sandbox(&copy.id).into()),
    });
    Ok((StatusCode::CREATED, Json(forked.collect())))
}
