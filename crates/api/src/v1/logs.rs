//! Logs of sandboxes on their host.

use axum::{extract::State, response::Response};
use http::HeaderValue;
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};
use wrenn_proto::rpc::hostagent::v1 as rpc;

use crate::{
    app::AppState,
    buffers,
    error::ApiError,
    extract::{ApiQuery, UnknownSandboxPath},
    openapi::{CommonErrors, HostErrors, SandboxErrors},
};

/// Content type of logs.
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// Log of a sandbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum LogSource {
    /// Supervisor and virtual machine monitor, as JSON lines.
    #[default]
    Supervisor,
    /// Serial console of the guest.
    Console,
}

/// Query parameters of the log call.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct LogQuery {
    /// `supervisor` or `console`. Default: `supervisor`.
    #[serde(default)]
    #[param(inline)]
    source: LogSource,
}

/// Returns a log of a sandbox.
///
/// The newest 0.5 MiB or more of each log are kept. Logs of a sandbox that failed stay readable, for
/// the newest 100 such sandboxes; those of a sandbox that was destroyed otherwise do not. Requires the
/// scope `hosts`, because the log contains paths of the host.
#[utoipa::path(
    get, path = "/v1/host/sandboxes/{id}/log", tag = "server", operation_id = "get_sandbox_log",
    params(("id" = String, Path, description = "Sandbox id."), LogQuery),
    responses(
        (status = 200, description = "The log.", body = String, content_type = "text/plain"),
        CommonErrors, SandboxErrors, HostErrors
    )
)]
pub(super) async fn get(
    State(app): State<AppState>,
    UnknownSandboxPath(id): UnknownSandboxPath,
    ApiQuery(query): ApiQuery<LogQuery>,
) -> Result<Response, ApiError> {
    let source = match query.source {
        LogSource::Supervisor => rpc::LogSource::LOG_SOURCE_SUPERVISOR,
        LogSource::Console => rpc::LogSource::LOG_SOURCE_CONSOLE,
    };
    let log = app.fleet.placement().agent.sandbox_log(&id, source).await?;
    let reserved = app.buffers.reserve(log.len())?;
    let length = log.len();
    let body = buffers::pieces(vec![log.into()], reserved);
    Ok(buffers::whole(body, length, TEXT))
}
