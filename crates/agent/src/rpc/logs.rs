//! Conversion of the call that returns the logs of a sandbox.

use connectrpc::ConnectError;
use wrenn_model::SandboxId;
use wrenn_proto::rpc::hostagent::v1 as pb;

use super::parse;
use crate::{
    sandbox::service::SandboxService,
    sandbox_logs::{LogSource, SandboxLogs},
};

pub(super) async fn get(
    sandboxes: &SandboxService,
    request: pb::GetSandboxLogRequest,
) -> Result<pb::GetSandboxLogResponse, ConnectError> {
    let id: SandboxId = parse("id", &request.id)?;
    let source = match request.source.as_known() {
        Some(pb::LogSource::LOG_SOURCE_CONSOLE) => LogSource::Console,
        _ => LogSource::Supervisor,
    };
    let host = sandboxes.host().clone();
    let read = tokio::task::spawn_blocking(move || {
        let sandbox_dir = host.sandbox_dirs.sandbox_dir(&id);
        let log = SandboxLogs::of(&host.config.data_dir).read(&sandbox_dir, &id, source);
        (id, log)
    });
    let panicked = |_| ConnectError::internal("the task that reads the log panicked");
    let (id, log) = read.await.map_err(panicked)?;
    let failed = |error| ConnectError::internal(format!("failed to read the log: {error}"));
    let content = log.map_err(failed)?.ok_or_else(|| {
        ConnectError::not_found(format!("there is no such log of sandbox `{id}`"))
    })?;
    Ok(pb::GetSandboxLogResponse {
        content,
        ..Default::default()
    })
}
