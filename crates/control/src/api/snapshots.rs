//! Snapshots: moments of sandboxes as templates, and the templates of all kinds.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
};
use http::{StatusCode, header};
use serde::Deserialize;
use utoipa::IntoParams;
use wrenn_proto::{
    SandboxId, TemplateName,
    rest::{CreateSnapshot, Template},
};

use super::{
    AppState,
    error::{ApiError, Code},
    extract::{ApiJson, ApiQuery, path_part},
    openapi::{BodyErrors, CommonErrors, HostErrors, SandboxErrors},
};
use crate::{agent_client::AgentError, host, lifecycle::LifecycleError};

/// How to make one.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateQuery {
    /// Replace a snapshot of this name. Sandboxes that stand on the old one are not touched.
    overwrite: Option<bool>,
}

/// Makes a template of this very moment of a running or paused sandbox, which goes on as it was. 409 `already_exists` if the
/// name is taken, 409 `invalid_state` unless it is `running` or `paused`.
#[utoipa::path(
    post, path = "/v1/snapshots", tag = "templates", operation_id = "create_snapshot", request_body = CreateSnapshot,
    params(CreateQuery),
    responses(
        (status = 201, description = "The template.", body = Template,
         headers(("location" = String, description = "Path of the template."))),
        CommonErrors, BodyErrors, SandboxErrors, HostErrors
    )
)]
pub(super) async fn create(
    State(app): State<AppState>,
    ApiQuery(query): ApiQuery<CreateQuery>,
    ApiJson(request): ApiJson<CreateSnapshot>,
) -> Result<
    (
        StatusCode,
        [(header::HeaderName, String); 1],
        Json<Template>,
    ),
    ApiError,
> {
    let id: SandboxId = request
        .sandbox_id
        .parse()
        .map_err(|error| ApiError::field("sandbox_id", error))?;
    let name: Option<TemplateName> = request
        .name
        .map(|name| name.parse())
        .transpose()
        .map_err(|error| ApiError::field("name", error))?;
    let overwrite = query.overwrite.unwrap_or(false);
    let made = make(&app, id, name, overwrite).await?;
    let place = format!("/v1/snapshots/{}", made.name);
    Ok((StatusCode::CREATED, [(header::LOCATION, place)], Json(made)))
}

/// Makes a snapshot, and notes of which sandbox. Goes on if the client goes away.
pub(crate) async fn make(
    app: &AppState,
    id: SandboxId,
    name: Option<TemplateName>,
    overwrite: bool,
) -> Result<Template, LifecycleError> {
    let app_of_task = Arc::clone(app);
    let task = app.lifecycle.spawn(async move {
        let app = app_of_task;
        let made = app.lifecycle.snapshot(&id, name, overwrite).await;
        // What is asked of the host from here on knows of it.
        app.host.changed().await;
        let made = host::template(made?);
        if let Err(error) = app.db.record_snapshot(&made, id.as_str()).await {
            // It is then a snapshot like any other, of an unknown sandbox.
            tracing::warn!(sandbox_id = %id, template = %made.name, %error, "cannot note whose snapshot it is");
        }
        Ok(made)
    });
    task.await
        .unwrap_or_else(|_| Err(AgentError::task_ended("snapshot").into()))
}

/// Which templates to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    /// `base` or `snapshot`. Default: both.
    #[serde(rename = "type")]
    kind: Option<String>,
}

/// All templates, by name, or those of one type. While the host does not answer: those that it had.
#[utoipa::path(
    get, path = "/v1/snapshots", tag = "templates", operation_id = "list_snapshots", params(ListQuery),
    responses((status = 200, description = "The templates.", body = [Template]), CommonErrors)
)]
pub(super) async fn list(
    State(app): State<AppState>,
    ApiQuery(query): ApiQuery<ListQuery>,
) -> Result<Json<Vec<Template>>, ApiError> {
    if let Some(kind) = &query.kind
        && ![host::BASE, host::SNAPSHOT].contains(&kind.as_str())
    {
        return Err(ApiError::field("type", "expected `base` or `snapshot`"));
    }
    let mut templates = known(&app).await?;
    templates.retain(|t| query.kind.as_ref().is_none_or(|kind| t.kind == *kind));
    Ok(Json(templates))
}

/// One template.
#[utoipa::path(
    get, path = "/v1/snapshots/{name}", tag = "templates", operation_id = "get_snapshot",
    params(("name" = String, Path, description = "The template.")),
    responses((status = 200, description = "The template.", body = Template), CommonErrors, SandboxErrors)
)]
pub(super) async fn get(
    State(app): State<AppState>,
    request: Request,
) -> Result<Json<Template>, ApiError> {
    let name = name(&app, request).await?;
    Ok(Json(find(&app, &name).await?))
}

/// Deletes a snapshot. 409 `conflict` while something stands on it that needs it, and for a `base` template.
#[utoipa::path(
    delete, path = "/v1/snapshots/{name}", tag = "templates", operation_id = "delete_snapshot",
    params(("name" = String, Path, description = "The template.")),
    responses((status = 204, description = "It is gone."), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn delete(
    State(app): State<AppState>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let name = name(&app, request).await?;
    if find(&app, &name).await?.kind == host::BASE {
        let message =
            format!("template `{name}` is an image, not a snapshot: it is removed on its host");
        return Err(ApiError::new(Code::Conflict, message));
    }
    let done = app.agent.delete_snapshot(name.as_str(), false).await;
    app.host.changed().await;
    done.map_err(|error| {
        let mut error = ApiError::from(error);
        if error.code == Code::InvalidState {
            error.code = Code::Conflict;
        }
        error
    })?;
    Ok(StatusCode::NO_CONTENT)
}

async fn name(app: &AppState, request: Request) -> Result<TemplateName, ApiError> {
    let (mut parts, _) = request.into_parts();
    let name = path_part(&mut parts, app, "name").await?;
    name.parse().map_err(|error| ApiError::field("name", error))
}

/// What the host has; or had, while it does not answer.
pub(crate) async fn known(app: &AppState) -> Result<Vec<Template>, ApiError> {
    match app.host.facts().await {
        Ok(facts) => {
            let mut templates = facts.templates;
            templates.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(templates)
        }
        Err(error) => {
            tracing::debug!(%error, "listing templates as they were");
            Ok(app.db.templates().await?)
        }
    }
}

async fn find(app: &AppState, name: &TemplateName) -> Result<Template, ApiError> {
    let found = known(app)
        .await?
        .into_iter()
        .find(|t| t.name == name.as_str());
    found.ok_or_else(|| ApiError::new(Code::NotFound, format!("there is no template `{name}`")))
}
