//! Templates and snapshots, for both APIs.

use std::sync::Arc;

use wrenn_api_types::Template;
use wrenn_control::{agent_client::AgentError, host, lifecycle::LifecycleError};
use wrenn_model::{SandboxId, TemplateName};

use crate::{app::AppState, error::ApiError, records::IntoRest};

/// Creates a snapshot and records its source sandbox. Completes even if the client disconnects.
pub(crate) async fn create_snapshot(
    app: &AppState,
    id: SandboxId,
    name: Option<TemplateName>,
    overwrite: bool,
) -> Result<Template, LifecycleError> {
    let app_of_task = Arc::clone(app);
    let task = app.lifecycle.spawn(async move {
        let app = app_of_task;
        let made = app.lifecycle.snapshot(&id, name, overwrite).await;
        // Later reads of the host's templates include the snapshot.
        app.host.changed().await;
        let made = host::template(made?);
        let recorded = async {
            let host = app.lifecycle.find_host(&id).await?;
            let host_id = host.agent.row_host_id();
            let recorded = app.db.record_snapshot(&host_id, &made, id.as_str()).await;
            recorded.map_err(LifecycleError::from)
        };
        if let Err(error) = recorded.await {
            // The snapshot is usable. Only its source sandbox is unknown.
            tracing::warn!(sandbox_id = %id, template = %made.name, %error, "snapshot source not recorded");
        }
        Ok(made.into_rest())
    });
    task.await
        .unwrap_or_else(|_| Err(AgentError::task_ended("snapshot").into()))
}

/// Writes a snapshot to the object store. Completes even if the client disconnects.
pub(crate) async fn push_snapshot(app: &AppState, name: TemplateName) -> Result<(), AgentError> {
    let app_of_task = Arc::clone(app);
    let task = app.lifecycle.spawn(async move {
        let placement = app_of_task.fleet.placement();
        placement.agent.push_snapshot(name.as_str()).await
    });
    task.await
        .unwrap_or_else(|_| Err(AgentError::task_ended("push")))
}

/// Takes a snapshot from the object store. Completes even if the client disconnects.
pub(crate) async fn pull_snapshot(
    app: &AppState,
    name: TemplateName,
    overwrite: bool,
) -> Result<Template, AgentError> {
    let app_of_task = Arc::clone(app);
    let task = app.lifecycle.spawn(async move {
        let app = app_of_task;
        let agent = &app.fleet.placement().agent;
        let pulled = agent.pull_snapshot(name.as_str(), overwrite).await;
        app.host.changed().await;
        Ok(host::template(pulled?).into_rest())
    });
    task.await
        .unwrap_or_else(|_| Err(AgentError::task_ended("pull")))
}

/// Returns the templates of the host. If the host does not answer, returns those that it last
/// reported.
pub(crate) async fn known(app: &AppState) -> Result<Vec<Template>, ApiError> {
    match app.host.facts().await {
        Ok(facts) => {
            let mut templates = facts.templates;
            templates.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(templates.into_iter().map(IntoRest::into_rest).collect())
        }
        Err(error) => {
            tracing::debug!(%error, "host unavailable, listing stored templates");
            let rows = app.db.templates().await?;
            Ok(rows.into_iter().map(IntoRest::into_rest).collect())
        }
    }
}
