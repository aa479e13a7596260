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

/// Size up to which a log grows, in bytes.
const TYPICAL_BYTES: usize = 1024 * 1024;

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
/// At least the newest 0.5 MiB of the supervisor's log and the newest 256 KiB of the console are
/// returned. After the removal of a sandbox, its logs are kept only if it had failed, and for the
/// newest 100 such sandboxes. Requires the scope `hosts`: the logs contain paths of the host.
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
    let mut reserved = app.buffers.reserve(TYPICAL_BYTES)?;
    let log = app.fleet.placement().agent.sandbox_log(&id, source).await?;
    let length = log.len();
    reserved.grow(length.saturating_sub(TYPICAL_BYTES))?;
    let body = buffers::pieces(vec![log.into()], reserved);
    Ok(buffers::whole(body, length, TEXT))
}
