//! Snapshots of sandboxes, stored as templates, and templates of all kinds.

use axum::{
    Json,
    extract::{Request, State},
};
use http::{StatusCode, header};
use serde::Deserialize;
use utoipa::IntoParams;
use wrenn_api_types::{CreateSnapshot, Template};
use wrenn_control::host;
use wrenn_model::{SandboxId, TemplateName};

use crate::{
    app::AppState,
    error::{ApiError, Code},
    extract::{ApiJson, ApiQuery, Caller, path_part},
    openapi::{BodyErrors, CommonErrors, HostErrors, SandboxErrors},
    templates,
};

/// Query parameters of the snapshot call.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateQuery {
    /// Replace an existing snapshot of this name. Sandboxes that depend on the old snapshot are not
    /// affected.
    overwrite: Option<bool>,
}

/// Creates a snapshot of a running or paused sandbox, as a template.
///
/// The sandbox keeps running, or stays paused. Fails with 409 `already_exists` if the name is
/// taken, and with 409 `invalid_state` unless the sandbox is `running` or `paused`.
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
    Caller(principal): Caller,
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
    app.ownership.require(&principal, &id).await?;
    let name: Option<TemplateName> = request
        .name
        .map(|name| name.parse())
        .transpose()
        .map_err(|error| ApiError::field("name", error))?;
    let overwrite = query.overwrite.unwrap_or(false);
    let made = templates::create_snapshot(&app, id, name, overwrite).await?;
    let place = format!("/v1/snapshots/{}", made.name);
    Ok((StatusCode::CREATED, [(header::LOCATION, place)], Json(made)))
}

/// Query parameters of the list call.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    /// `base` or `snapshot`. Default: both.
    #[serde(rename = "type")]
    kind: Option<String>,
}

/// Lists templates by name, optionally of one type only.
///
/// If the host does not answer, returns the templates that it last reported.
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
    let mut templates = templates::known(&app).await?;
    templates.retain(|t| query.kind.as_ref().is_none_or(|kind| t.kind == *kind));
    Ok(Json(templates))
}

/// Returns one template.
#[utoipa::path(
    get, path = "/v1/snapshots/{name}", tag = "templates", operation_id = "get_snapshot",
    params(("name" = String, Path, description = "Name of the template.")),
    responses((status = 200, description = "The template.", body = Template), CommonErrors, SandboxErrors)
)]
pub(super) async fn get(
    State(app): State<AppState>,
    request: Request,
) -> Result<Json<Template>, ApiError> {
    let name = name(&app, request).await?;
    Ok(Json(find(&app, &name).await?))
}

/// Deletes a snapshot.
///
/// Fails with 409 `conflict` while a sandbox created from it exists, and for a `base` template.
#[utoipa::path(
    delete, path = "/v1/snapshots/{name}", tag = "templates", operation_id = "delete_snapshot",
    params(("name" = String, Path, description = "Name of the template.")),
    responses((status = 204, description = "The snapshot was deleted."), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn delete(
    State(app): State<AppState>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let name = name(&app, request).await?;
    if find(&app, &name).await?.kind == host::BASE {
        let message =
            format!("template `{name}` is a base image, not a snapshot; remove it on its host");
        return Err(ApiError::new(Code::Conflict, message));
    }
    let done = app
        .fleet
        .placement()
        .agent
        .delete_snapshot(name.as_str(), false)
        .await;
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

/// Writes a snapshot to the object store of its host, under the same name.
///
/// Parts that the object store has are not written again. Replaces a snapshot that the object store
/// has under this name. Fails with 409 `invalid_state` if the host has no object store, and with 503
/// if the store does not respond. Completes even if the client disconnects.
#[utoipa::path(
    post, path = "/v1/snapshots/{name}/push", tag = "templates", operation_id = "push_snapshot",
    params(("name" = String, Path, description = "Name of the snapshot.")),
    responses((status = 204, description = "The object store has the snapshot."), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn push(
    State(app): State<AppState>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let name = name(&app, request).await?;
    templates::push_snapshot(&app, name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Takes a snapshot from the object store of the host, under the same name.
///
/// Its memory stays there: sandboxes load what they need. Fails with 409 `already_exists` if the name
/// is taken, with 404 if the object store has no snapshot of this name, and with 409 `invalid_state`
/// if the host has no object store, or cannot load the snapshot. Completes even if the client
/// disconnects.
#[utoipa::path(
    post, path = "/v1/snapshots/{name}/pull", tag = "templates", operation_id = "pull_snapshot",
    params(("name" = String, Path, description = "Name of the snapshot."), CreateQuery),
    responses((status = 201, description = "The template.", body = Template), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn pull(
    State(app): State<AppState>,
    ApiQuery(query): ApiQuery<CreateQuery>,
    request: Request,
) -> Result<(StatusCode, Json<Template>), ApiError> {
    let name = name(&app, request).await?;
    let overwrite = query.overwrite.unwrap_or(false);
    let pulled = templates::pull_snapshot(&app, name, overwrite).await?;
    Ok((StatusCode::CREATED, Json(pulled)))
}

async fn name(app: &AppState, request: Request) -> Result<TemplateName, ApiError> {
    let (mut parts, _) = request.into_parts();
    let name = path_part(&mut parts, app, "name").await?;
    name.parse().map_err(|error| ApiError::field("name", error))
}

async fn find(app: &AppState, name: &TemplateName) -> Result<Template, ApiError> {
    let found = templates::known(app)
        .await?
        .into_iter()
        .find(|t| t.name == name.as_str());
    found.ok_or_else(|| ApiError::new(Code::NotFound, format!("there is no template `{name}`")))
}
