//! Conversion of the calls for named snapshots and forks.

use connectrpc::ConnectError;
use wrenn_model::SandboxId;
use wrenn_proto::rpc::hostagent::v1 as pb;

use super::{lifecycle::info as sandbox_info, parse};
use crate::{
    admission,
    sandbox::{Sandbox, service::SandboxService},
    snapshots::TaggedSnapshot,
};

/// Describes a named snapshot as a template.
pub(super) fn info(named: &TaggedSnapshot) -> pb::TemplateInfo {
    let info = pb::TemplateInfo {
        name: named.name.to_string(),
        size_bytes: named.size_bytes,
        kind: pb::TemplateKind::TEMPLATE_KIND_SNAPSHOT.into(),
        generation: u32::try_from(named.generation).unwrap_or(u32::MAX),
        ..Default::default()
    };
    // Fields that stay 0 are unknown.
    let Some(size) = named.size else {
        return info;
    };
    pb::TemplateInfo {
        vcpus: size.vcpus,
        memory_mb: size.memory_mib,
        created_unix_ms: named.created_unix_ms,
        disk_size_mb: size.disk_mib,
        ..info
    }
}

/// Takes a snapshot of a sandbox and gives it a name.
pub(super) async fn create(
    sandboxes: &SandboxService,
    sandbox: &Sandbox,
    request: pb::CreateSnapshotRequest,
) -> Result<pb::CreateSnapshotResponse, ConnectError> {
    let name = parse("name", &request.name)?;
    let named = sandboxes.snapshot_as(sandbox, name, request.overwrite);
    Ok(pb::CreateSnapshotResponse {
        template: info(&named.await?).into(),
        ..Default::default()
    })
}

/// Removes the name of a snapshot.
pub(super) async fn delete(
    sandboxes: &SandboxService,
    name: &str,
    force: bool,
) -> Result<(), ConnectError> {
    let name = parse("name", name)?;
    Ok(sandboxes.delete_snapshot(name, force).await?)
}

/// Writes a named snapshot to the object store.
pub(super) async fn push(sandboxes: &SandboxService, name: &str) -> Result<(), ConnectError> {
    Ok(sandboxes.push_snapshot(parse("name", name)?).await?)
}

/// Takes a named snapshot from the object store.
pub(super) async fn pull(
    sandboxes: &SandboxService,
    name: &str,
    overwrite: bool,
) -> Result<pb::PullSnapshotResponse, ConnectError> {
    let pulled = sandboxes.pull_snapshot(parse("name", name)?, overwrite);
    Ok(pb::PullSnapshotResponse {
        template: info(&pulled.await?).into(),
        ..Default::default()
    })
}

/// Creates copies of a sandbox.
pub(super) async fn fork(
    sandboxes: &SandboxService,
    sandbox: &Sandbox,
    request: pb::ForkSandboxRequest,
) -> Result<pb::ForkSandboxResponse, ConnectError> {
    // Checked before the IDs are parsed, because there may be very many.
    admission::check_fork_copies(request.copy_ids.len())?;
    let ids = request.copy_ids.iter();
    let ids: Result<Vec<SandboxId>, _> = ids.map(|id| parse("copy_ids", id)).collect();
    let copies = sandboxes.fork(sandbox, ids?).await?;
    Ok(pb::ForkSandboxResponse {
        copies: copies.iter().map(|copy| sandbox_info(copy)).collect(),
        ..Default::default()
    })
}
