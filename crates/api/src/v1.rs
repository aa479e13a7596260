//! Version 1 of the REST API: one file per resource.

mod api_keys;
mod controls;
mod exec;
mod exec_stream;
mod files;
mod files_stream;
mod health;
mod host;
mod logs;
mod metrics;
mod pause;
mod process;
mod processes;
mod pty;
mod sandboxes;
mod session;
mod snapshots;
mod socket;
mod templates;
mod unknown;
mod utf8;

use utoipa_axum::{router::OpenApiRouter, routes};

use crate::app::AppState;

pub(crate) use health::PATH as HEALTH_PATH;

/// Routes below a sandbox, with their documentation.
fn sandbox_routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(sandboxes::create, sandboxes::list))
        .routes(routes!(sandboxes::get, sandboxes::destroy))
        .routes(routes!(sandboxes::ping))
        .routes(routes!(pause::pause))
        .routes(routes!(pause::resume))
        .routes(routes!(pause::fork))
        .routes(routes!(metrics::get))
        .routes(routes!(exec::exec))
        .routes(routes!(exec_stream::exec_stream))
        .routes(routes!(pty::pty))
        .routes(routes!(processes::list))
        .routes(routes!(processes::kill))
        .routes(routes!(processes::stream))
        .routes(routes!(files::write))
        .routes(routes!(files::read))
        .routes(routes!(files::list))
        .routes(routes!(files::mkdir))
        .routes(routes!(files::remove))
        .routes(routes!(files_stream::write))
        .routes(routes!(files_stream::read))
}

/// Routes of the API, with their documentation.
pub(crate) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(health::health))
        .routes(routes!(host::get))
        .routes(routes!(logs::get))
        .routes(routes!(unknown::list))
        .routes(routes!(unknown::adopt))
        .routes(routes!(unknown::destroy))
        .routes(routes!(templates::list))
        .routes(routes!(snapshots::create, snapshots::list))
        .routes(routes!(snapshots::get, snapshots::delete))
        .routes(routes!(snapshots::push))
        .routes(routes!(snapshots::pull))
        .routes(routes!(api_keys::create, api_keys::list))
        .routes(routes!(api_keys::delete))
        .nest("/v1/sandboxes", sandbox_routes())
        .nest("/v1/capsules", sandbox_routes())
}
