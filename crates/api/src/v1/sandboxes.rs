//! Sandboxes: create, list, get, destroy, ping.

use std::time::Duration;

use axum::{Json, extract::State};
use http::{StatusCode, header};
use serde::Deserialize;
use tokio::time::{Instant, timeout_at};
use utoipa::IntoParams;
use wrenn_api_types::{CreateSandbox, Sandbox};
use wrenn_control::lifecycle::{LifecycleError, PendingCreate};
use wrenn_db::{MAX_LIST, Owner, Sandbox as Row};
use wrenn_model::{SandboxId, SandboxStatus};

use crate::{
    app::{AppState, BOOT_WAIT},
    error::{ApiError, Code},
    extract::{ApiJsonOrEmpty, ApiQuery, Caller, SandboxPath},
    openapi::{BodyErrors, CommonErrors, HostErrors, SandboxErrors},
    records::IntoRest as _,
    validate,
};

/// Time after which a create is answered, whatever the status of the sandbox. Clients may rely on
/// 5 s.
const ANSWER_AFTER: Duration = Duration::from_millis(4500);

/// Creates a sandbox.
///
/// The response is sent within 5 s. The status is `running`, or `pending` or `starting` while the
/// sandbox boots; commands and file calls wait for the boot. If the client disconnects before the
/// response, the sandbox is destroyed.
///
/// Fails with 404 if the template does not exist. If the create fails before the response is sent,
/// the response is the error, and the record of the sandbox is kept with the status `error`.
#[utoipa::path(
    post, path = "/", tag = "sandboxes", operation_id = "create_sandbox", request_body = Option<CreateSandbox>,
    responses(
        (status = 201, description = "The new sandbox.", body = Sandbox,
         headers(("location" = String, description = "Path of the sandbox."))),
        CommonErrors, BodyErrors, SandboxErrors, HostErrors
    )
)]
pub(super) async fn create(
    State(app): State<AppState>,
    Caller(principal): Caller,
    ApiJsonOrEmpty(request): ApiJsonOrEmpty<CreateSandbox>,
) -> Result<(StatusCode, [(header::HeaderName, String); 1], Json<Sandbox>), ApiError> {
    let deadline = Instant::now() + ANSWER_AFTER;
    let template = validate::create_shape(&request)?;
    let host = timeout_at(deadline, app.host.facts()).await.map_err(|_| {
        ApiError::new(
            Code::Timeout,
            "timed out reading the templates and capacity of the host",
        )
    })??;
    let new = validate::create_fits(principal.team, request, template, &host, app.default_egress)?;
    // From here on, dropping this future destroys the sandbox.
    let mut creation = app.lifecycle.create(new, None);
    let id = match timeout_at(deadline, creation.id()).await {
        Ok(id) => id?,
        Err(_) => return Err(ApiError::new(Code::Timeout, "database write timed out")),
    };
    let row = settled(&app, &mut creation, &id, deadline).await;
    match row {
        Ok(row) => {
            creation.keep();
            let place = format!("/v1/sandboxes/{id}");
            let row = row.into_rest();
            Ok((StatusCode::CREATED, [(header::LOCATION, place)], Json(row)))
        }
        Err(mut error) => {
            if error.code != Code::DbError {
                // The record keeps the reason of the failure.
                creation.keep();
                error.message = format!("{} (sandbox {id})", error.message);
            }
            Err(error)
        }
    }
}

/// Returns the row when the create has ended, or at the deadline.
async fn settled(
    app: &AppState,
    creation: &mut PendingCreate,
    id: &SandboxId,
    deadline: Instant,
) -> Result<Row, ApiError> {
    if let Ok(done) = timeout_at(deadline, creation.done()).await {
        done?;
    }
    Ok(app.lifecycle.get(id).await?)
}

/// Query parameters of the list call.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    /// Comma-separated statuses, or `all`. Default: all except `stopped` and `error`.
    status: Option<String>,
    /// Maximum number of entries, 1 to 1000. Default: 1000.
    limit: Option<i64>,
}

/// Lists sandboxes, newest first.
///
/// Without `status`, sandboxes that are `stopped` or `error` are left out.
#[utoipa::path(
    get, path = "/", tag = "sandboxes", operation_id = "list_sandboxes", params(ListQuery),
    responses((status = 200, description = "The sandboxes.", body = [Sandbox]), CommonErrors)
)]
pub(super) async fn list(
    State(app): State<AppState>,
    Caller(principal): Caller,
    ApiQuery(query): ApiQuery<ListQuery>,
) -> Result<Json<Vec<Sandbox>>, ApiError> {
    let statuses = statuses(query.status.as_deref())?;
    let limit = match query.limit {
        None => MAX_LIST,
        Some(n) => u32::try_from(n)
            .ok()
            .filter(|n| (1..=MAX_LIST).contains(n))
            .ok_or_else(|| ApiError::field("limit", format!("expected 1 to {MAX_LIST}")))?,
    };
    let owner = Owner::Team(&principal.team);
    let rows = app.db.sandboxes(owner, &statuses, limit).await?;
    Ok(Json(rows.into_iter().map(Row::into_rest).collect()))
}

fn statuses(words: Option<&str>) -> Result<Vec<SandboxStatus>, ApiError> {
    let all = SandboxStatus::ALL.into_iter();
    let gone =
        |status: &SandboxStatus| matches!(status, SandboxStatus::Stopped | SandboxStatus::Error);
    match words {
        None => Ok(all.filter(|status| !gone(status)).collect()),
        Some("all") => Ok(all.collect()),
        Some(words) => {
            let mut statuses = Vec::new();
            for word in words.split(',') {
                let status = SandboxStatus::parse(word).ok_or_else(|| {
                    let shown: String = word.chars().take(80).collect();
                    ApiError::field("status", format!("`{shown}` is not a status"))
                })?;
                if !statuses.contains(&status) {
                    statuses.push(status);
                }
            }
            Ok(statuses)
        }
    }
}

/// Returns one sandbox.
///
/// A destroyed sandbox stays readable, with the status `stopped`.
#[utoipa::path(
    get, path = "/{id}", tag = "sandboxes", operation_id = "get_sandbox",
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 200, description = "The sandbox.", body = Sandbox), CommonErrors, SandboxErrors)
)]
pub(super) async fn get(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
) -> Result<Json<Sandbox>, ApiError> {
    Ok(Json(app.lifecycle.get(&id).await?.into_rest()))
}

/// Destroys a sandbox, even while it is being created.
///
/// Succeeds (204) if the sandbox is already `stopped`. If the host does not answer, the response is
/// 503, and the sandbox is destroyed as soon as the host responds.
#[utoipa::path(
    delete, path = "/{id}", tag = "sandboxes", operation_id = "destroy_sandbox",
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 204, description = "The sandbox was destroyed."), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn destroy(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
) -> Result<StatusCode, ApiError> {
    match app.lifecycle.destroy(&id, "").await {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(LifecycleError::Agent(error)) => {
            let mut error = ApiError::from(error);
            error.message = format!(
                "{}; the sandbox is `stopping` and will be destroyed when the host responds",
                error.message
            );
            Err(error)
        }
        Err(error) => Err(error.into()),
    }
}

/// Restarts the idle timeout of a sandbox.
#[utoipa::path(
    post, path = "/{id}/ping", tag = "sandboxes", operation_id = "ping_sandbox",
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 204, description = "The activity was recorded."), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn ping(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
) -> Result<StatusCode, ApiError> {
    let (row, _used) = app.lifecycle.enter(&id, BOOT_WAIT).await?;
    let host = app.lifecycle.host_of(&row).await?;
    host.agent.ping(id.as_str()).await?;
    Ok(StatusCode::NO_CONTENT)
}
