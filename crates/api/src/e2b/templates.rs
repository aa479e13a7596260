//! Templates and snapshots, from which sandboxes are created.
//!
//! The `templateID` of a template is its internal name. Module `names` defines how the name is
//! presented. Base images are removed on their host, snapshots through this API.

use std::cmp::Reverse;

use axum::{Json, extract::State};
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use utoipa::{IntoParams, ToSchema};
use wrenn_api_types::Template;
use wrenn_control::host;
use wrenn_model::{TemplateName, limits};
use wrenn_proto::guest;

use super::{
    error::{E2bConflict, E2bError, E2bErrors, E2bNotFound},
    extract::{E2bJson, E2bNamePath, E2bQuery, E2bSandboxPath},
    models::E2bSnapshot,
    names::{self, NameError, Shown},
    paging,
};
use crate::{app::AppState, templates};

/// A template in a list.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct E2bTemplate {
    #[serde(rename = "templateID")]
    template_id: String,
    /// Derived from name and creation time, so that it changes with the template.
    #[serde(rename = "buildID")]
    build_id: String,
    cpu_count: u32,
    #[serde(rename = "memoryMB")]
    memory_mb: u32,
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u32,
    /// Always false: all templates have the same owner.
    public: bool,
    aliases: Vec<String>,
    names: Vec<String>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    updated_at: Timestamp,
    /// Not known; always null.
    created_by: Option<String>,
    /// Not known; always null.
    last_spawned_at: Option<String>,
    /// Not counted; always 0.
    spawn_count: u32,
    build_count: u32,
    build_status: &'static str,
    envd_version: &'static str,
}

impl E2bTemplate {
    fn of(template: &Template) -> Self {
        let shown = Shown::of(&template.name);
        let aliases = shown.named.then(|| shown.name.clone());
        Self {
            template_id: template.name.clone(),
            build_id: build_id(template),
            cpu_count: template.vcpus.unwrap_or(1),
            memory_mb: template.memory_mb.unwrap_or(0),
            disk_size_mb: template.disk_size_mb.unwrap_or(limits::DEFAULT_DISK_MIB),
            public: false,
            aliases: aliases.into_iter().collect(),
            names: shown.names(),
            created_at: template.created_at,
            updated_at: template.created_at,
            created_by: None,
            last_spawned_at: None,
            spawn_count: 0,
            build_count: 1,
            build_status: "ready",
            envd_version: guest::ENVD_CONTRACT_VERSION,
        }
    }
}

fn build_id(template: &Template) -> String {
    let name = format!("{} {}", template.name, template.created_at);
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().zip(Sha256::digest(name)) {
        *to = from;
    }
    uuid::Builder::from_random_bytes(bytes)
        .into_uuid()
        .to_string()
}

/// Lists all templates, including snapshots.
#[utoipa::path(
    get, path = "/templates", tag = "e2b", operation_id = "e2b_list_templates",
    responses((status = 200, description = "The templates.", body = [E2bTemplate]), E2bErrors)
)]
pub(super) async fn list(State(app): State<AppState>) -> Result<Json<Vec<E2bTemplate>>, E2bError> {
    let templates = templates::known(&app).await?;
    Ok(Json(templates.iter().map(E2bTemplate::of).collect()))
}

/// Lists all templates, including snapshots (version 2).
#[utoipa::path(
    get, path = "/v2/templates", tag = "e2b", operation_id = "e2b_list_templates_v2",
    responses((status = 200, description = "The templates.", body = [E2bTemplate]), E2bErrors)
)]
pub(super) async fn list_v2(
    State(app): State<AppState>,
) -> Result<Json<Vec<E2bTemplate>>, E2bError> {
    let templates = templates::known(&app).await?;
    Ok(Json(templates.iter().map(E2bTemplate::of).collect()))
}

/// Template that a name refers to.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct E2bAlias {
    #[serde(rename = "templateID")]
    template_id: String,
    public: bool,
}

/// Resolves a name to its template.
#[utoipa::path(
    get, path = "/templates/aliases/{name}", tag = "e2b", operation_id = "e2b_get_alias",
    params(("name" = String, Path, description = "`[wrenn/]name[:tag]`, percent-encoded as one path segment.")),
    responses((status = 200, description = "The template.", body = E2bAlias), E2bErrors, E2bNotFound)
)]
pub(super) async fn alias(
    State(app): State<AppState>,
    E2bNamePath(text): E2bNamePath,
) -> Result<Json<E2bAlias>, E2bError> {
    let template = find(&app, &text).await?;
    Ok(Json(E2bAlias {
        template_id: template.name,
        public: false,
    }))
}

/// Deletes a snapshot.
///
/// Sandboxes that were created from the snapshot keep the files they depend on. Fails with 409 for
/// a base image.
#[utoipa::path(
    delete, path = "/templates/{name}", tag = "e2b", operation_id = "e2b_delete_template",
    params(("name" = String, Path, description = "`[wrenn/]name[:tag]`, percent-encoded as one path segment.")),
    responses((status = 204, description = "The snapshot was deleted."), E2bErrors, E2bNotFound, E2bConflict)
)]
pub(super) async fn delete(
    State(app): State<AppState>,
    E2bNamePath(text): E2bNamePath,
) -> Result<StatusCode, E2bError> {
    if text == "tags" {
        // The path is that of another call of the API, which is not implemented.
        return Err(E2bError::unimplemented("template tags"));
    }
    let template = find(&app, &text).await?;
    if template.kind == host::BASE {
        let message = "this template is a base image, not a snapshot; remove it on its host";
        return Err(E2bError::new(StatusCode::CONFLICT, message));
    }
    let done = app
        .fleet
        .placement()
        .agent
        .delete_snapshot(&template.name, true)
        .await;
    app.host.changed().await;
    match done {
        Err(error) if error.is_not_found() => Err(E2bError::no_template(&text)),
        done => {
            done?;
            Ok(StatusCode::NO_CONTENT)
        }
    }
}

/// Finds a template by name. A malformed name is reported as not found.
async fn find(app: &AppState, text: &str) -> Result<Template, E2bError> {
    let name = names::parse(text).map_err(|_| E2bError::no_template(text))?;
    let known = templates::known(app).await?;
    let found = known.into_iter().find(|t| t.name == name.as_str());
    found.ok_or_else(|| E2bError::no_template(text))
}

/// Body of a snapshot request.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct E2bNewSnapshot {
    /// `[wrenn/]name[:tag]`. An existing snapshot of that name is replaced. Default: an unnamed
    /// snapshot with a generated id.
    name: Option<String>,
    /// `false` is not implemented.
    memory: Option<bool>,
}

/// Creates a snapshot of a running or paused sandbox.
///
/// The sandbox keeps running, or stays paused.
#[utoipa::path(
    post, path = "/sandboxes/{id}/snapshots", tag = "e2b", operation_id = "e2b_create_snapshot",
    request_body = Option<E2bNewSnapshot>, params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 201, description = "The snapshot.", body = E2bSnapshot), E2bErrors, E2bNotFound, E2bConflict)
)]
pub(super) async fn create_snapshot(
    State(app): State<AppState>,
    E2bSandboxPath(id): E2bSandboxPath,
    E2bJson(request): E2bJson<E2bNewSnapshot>,
) -> Result<(StatusCode, Json<E2bSnapshot>), E2bError> {
    if request.memory == Some(false) {
        return Err(E2bError::unimplemented("`memory`: false"));
    }
    let name = match request.name.as_deref().filter(|name| !name.is_empty()) {
        None => None,
        Some(text) => Some(new_name(text)?),
    };
    if let Some(name) = &name {
        refuse_image(&app, name).await?;
    }
    let made = templates::create_snapshot(&app, id, name, true).await?;
    Ok((StatusCode::CREATED, Json(E2bSnapshot::of(&made.name))))
}

/// Rejects the name of a base image. A snapshot may replace a snapshot of the same name, but never
/// an image, from which sandboxes boot.
async fn refuse_image(app: &AppState, name: &TemplateName) -> Result<(), E2bError> {
    let known = templates::known(app).await?;
    let image = |template: &Template| template.kind == host::BASE && template.name == name.as_str();
    if known.iter().any(image) {
        let message = format!("`{name}` is a base image, which a snapshot cannot replace");
        return Err(E2bError::new(StatusCode::CONFLICT, message));
    }
    Ok(())
}

fn new_name(text: &str) -> Result<TemplateName, E2bError> {
    let bad = |error: NameError| E2bError::field("name", error);
    let name = names::parse(text).map_err(bad)?;
    // The name must be presented as it was given.
    let (plain, tag) = names::split(text).map_err(bad)?;
    let shown = Shown::of(name.as_str());
    if shown.name != plain || tag.is_some_and(|tag| tag != shown.tag) {
        return Err(bad(NameError::Name));
    }
    Ok(name)
}

/// Query parameters of the snapshot list.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(rename_all = "camelCase")]
pub(super) struct SnapshotQuery {
    /// Sandbox from which the snapshots were created.
    #[serde(rename = "sandboxID")]
    sandbox_id: Option<String>,
    /// `[wrenn/]name[:tag]`. Without a tag, all tags match.
    name: Option<String>,
    /// Maximum number of entries. Default and maximum: 100.
    limit: Option<i64>,
    /// Token from the header `x-next-token` of the previous page.
    next_token: Option<String>,
}

/// Lists snapshots, newest first, in pages.
#[utoipa::path(
    get, path = "/snapshots", tag = "e2b", operation_id = "e2b_list_snapshots", params(SnapshotQuery),
    responses(
        (status = 200, description = "The snapshots.", body = [E2bSnapshot],
         headers(("x-next-token" = String, description = "Token of the next page; absent on the last page."))),
        E2bErrors
    )
)]
pub(super) async fn list_snapshots(
    State(app): State<AppState>,
    E2bQuery(query): E2bQuery<SnapshotQuery>,
) -> Result<(HeaderMap, Json<Vec<E2bSnapshot>>), E2bError> {
    let limit = paging::limit(query.limit, paging::MAX_LIMIT)?;
    let after = paging::place(query.next_token.as_deref())?;
    let mut found = templates::known(&app).await?;
    found.retain(|template| template.kind == host::SNAPSHOT);
    if let Some(sandbox) = query.sandbox_id.as_deref().filter(|id| !id.is_empty()) {
        let of_sandbox = app.db.templates_of(sandbox).await?;
        found.retain(|template| of_sandbox.contains(&template.name));
    }
    if let Some(text) = query.name.as_deref().filter(|name| !name.is_empty()) {
        found.retain(|template| has_name(template, text));
    }
    let order = |template: &Template| {
        let time = template.created_at.as_millisecond();
        (Reverse(time), template.name.clone())
    };
    found.sort_by_key(order);
    if let Some((time, name)) = after {
        found.retain(|template| order(template) > (Reverse(time), name.clone()));
    }
    let more = found.len() > limit;
    found.truncate(limit);
    let last = found.last().filter(|_| more);
    let headers = last
        .map(|last| paging::next_page((last.created_at.as_millisecond(), &last.name)))
        .unwrap_or_default();
    let page = found.iter().map(|template| E2bSnapshot::of(&template.name));
    Ok((headers, Json(page.collect())))
}

fn has_name(template: &Template, text: &str) -> bool {
    let Ok((name, tag)) = names::split(text) else {
        return false;
    };
    let shown = Shown::of(&template.name);
    template.name == text || (shown.name == name && tag.is_none_or(|tag| tag == shown.tag))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::*;

    #[test]
    fn new_name_is_shown_unchanged() {
        for (text, here) in [
            ("mine", "mine"),
            ("wrenn/mine:v1", "mine..v1"),
            ("mine:default", "mine"),
        ] {
            assert_eq!(new_name(text).unwrap().as_str(), here);
        }
        for bad in ["", "other/mine", "a..b", "a b", "a/b/c", "a:"] {
            assert!(new_name(bad).is_err(), "{bad}");
        }
    }
}
