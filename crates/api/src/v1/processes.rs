//! Running processes that were started through the API.

use axum::{
    Json,
    extract::{FromRequestParts, State, ws::WebSocket},
    response::Response,
};
use http::{StatusCode, request::Parts};
use serde::Deserialize;
use utoipa::IntoParams;
use wrenn_api_types::{Process, ProcessList};
use wrenn_model::SandboxId;
use wrenn_proto::rpc::process::Signal;

use super::{
    exec_stream::ExecProtocol,
    process::Selector,
    session::{self, Session},
    socket::{ApiSocket, split},
};
use crate::{
    app::AppState,
    error::ApiError,
    extract::{ApiQuery, SandboxPath, path_part},
    openapi::{CommonErrors, HostErrors, SandboxErrors},
};

/// `{process}` of the path.
pub(super) struct ProcessPath(Selector);

impl<S: Send + Sync> FromRequestParts<S> for ProcessPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let text = path_part(parts, state, "process").await?;
        Selector::parse(&text).map(Self)
    }
}

/// Lists running processes that were started through the API.
#[utoipa::path(
    get, path = "/{id}/processes", tag = "processes", operation_id = "list_processes",
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 200, description = "The processes.", body = ProcessList), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn list(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
) -> Result<Json<ProcessList>, ApiError> {
    let (guest, _used) = app.ready(&id).await?;
    let found = guest.processes().await?;
    let processes = found.into_iter().map(|process| {
        let config = process.config.into_option().unwrap_or_default();
        Process {
            pid: process.pid,
            tag: process.tag.filter(|tag| !tag.is_empty()),
            cmd: config.cmd,
            args: config.args,
        }
    });
    Ok(Json(ProcessList {
        processes: processes.collect(),
    }))
}

/// Query parameters of the signal call.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct SignalQuery {
    /// `SIGTERM` or `SIGKILL`. Default: `SIGKILL`.
    signal: Option<String>,
}

/// Sends a signal to a process.
///
/// `SIGKILL` also kills all descendants of the process. `SIGTERM` is sent to its process group.
#[utoipa::path(
    delete, path = "/{id}/processes/{process}", tag = "processes", operation_id = "signal_process",
    params(
        ("id" = String, Path, description = "Sandbox id."),
        ("process" = String, Path, description = "Process id or tag."),
        SignalQuery
    ),
    responses((status = 204, description = "The signal was sent."), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn kill(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ProcessPath(process): ProcessPath,
    ApiQuery(query): ApiQuery<SignalQuery>,
) -> Result<StatusCode, ApiError> {
    let signal = match query.signal.as_deref() {
        None | Some("SIGKILL" | "KILL" | "9") => Signal::SIGNAL_SIGKILL,
        Some("SIGTERM" | "TERM" | "15") => Signal::SIGNAL_SIGTERM,
        Some(_) => return Err(ApiError::field("signal", "expected `SIGTERM` or `SIGKILL`")),
    };
    let (guest, _used) = app.ready(&id).await?;
    guest.signal(process.to_rpc(), signal).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Streams the output of a running process from now on, over a WebSocket.
///
/// Uses the messages of `exec/stream`. The client may send `stop`. If no other client takes the
/// output, the newest 64 KiB that no client has taken come first, after an `error` with the code
/// `output_lost` if more was dropped.
#[utoipa::path(
    get, path = "/{id}/processes/{process}/stream", tag = "processes", operation_id = "stream_process",
    params(
        ("id" = String, Path, description = "Sandbox id."),
        ("process" = String, Path, description = "Process id or tag.")
    ),
    responses((status = 101, description = "The WebSocket is open."), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn stream(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ProcessPath(process): ProcessPath,
    socket: ApiSocket,
) -> Result<Response, ApiError> {
    socket
        .open(app, id, |app, id, socket| run(app, id, process, socket))
        .await
}

async fn run(app: AppState, id: SandboxId, process: Selector, socket: WebSocket) {
    let (outbox, inbox) = split(socket);
    let opened = Session::connect(&app, &id, process, ExecProtocol::default()).await;
    session::serve(&app, outbox, inbox, opened).await;
}
