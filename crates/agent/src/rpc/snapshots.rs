//! Named snapshots and forks.

use std::{collections::BTreeMap, sync::Arc};

use connectrpc::ConnectError;
use wrenn_model::{SandboxId, TemplateName};
use wrenn_proto::rpc::hostagent::v1 as pb;

use super::lifecycle::{self, CreateParams, blocking, info as sandbox_info};
use crate::{
    host,
    sandbox::{CreateError, Sandbox, actor::SandboxActors},
    snapshots::{LocatedSnapshot, TaggedSnapshot},
    templates::TemplateError,
};

/// Maximum number of copies per fork call.
const MAX_COPIES: usize = 100;

/// Describes a named snapshot as a template.
pub(super) fn info(named: TaggedSnapshot) -> pb::TemplateInfo {
    let info = pb::TemplateInfo {
        name: named.name.into(),
        size_bytes: named.size_bytes,
        kind: pb::TemplateKind::TEMPLATE_KIND_SNAPSHOT.into(),
        generation: u32::try_from(named.generation).unwrap_or(u32::MAX),
        ..Default::default()
    };
    // Fields that stay 0 are unknown.
    let Some(manifest) = named.manifest else {
        return info;
    };
    pb::TemplateInfo {
        vcpus: manifest.vcpus,
        memory_mb: manifest.memory_mib,
        created_unix_ms: manifest.created_unix_ms,
        disk_size_mb: manifest.disk_mib,
        ..info
    }
}

/// Takes a snapshot of a sandbox and gives it a name.
pub(super) async fn create(
    actors: &SandboxActors,
    sandbox: &Sandbox,
    request: pb::CreateSnapshotRequest,
) -> Result<pb::CreateSnapshotResponse, ConnectError> {
    let name: TemplateName = parse("name", &request.name)?;
    let host = actors.host.clone();
    let check = {
        let name = name.clone();
        move || match host.templates.template(&name) {
            Ok(_) => Ok(true),
            Err(TemplateError::NotFound(_)) => {
                Ok(!request.overwrite && host.snapshots.has_name(&name))
            }
            Err(error) => Err(error.into()),
        }
    };
    // Checked before the VM is paused. Of two concurrent calls, the faster one gets the name.
    if blocking(check).await.map_err(|e| ConnectError::from(&e))? {
        return Err(ConnectError::already_exists(format!(
            "`name`: template `{name}` already exists"
        )));
    }
    let pin = sandbox.freeze().await?;
    let host = actors.host.clone();
    let named = blocking(move || Ok(host.snapshots.name(&name, &pin, request.overwrite)?)).await;
    let named = named.map_err(|e| ConnectError::from(&e))?;
    // The previous snapshot of this name may have lost its last reference.
    actors.collect_snapshots();
    Ok(pb::CreateSnapshotResponse {
        template: info(named).into(),
        ..Default::default()
    })
}

/// Removes the name of a snapshot, unless sandboxes were created from it. With `force`, removes the
/// name even then: the actors of these sandboxes hold references to the snapshots that they depend
/// on, which are collected when the last reference is gone.
pub(super) async fn delete(
    actors: &SandboxActors,
    name: &str,
    force: bool,
) -> Result<(), ConnectError> {
    let name: TemplateName = parse("name", name)?;
    let all = actors.registry.list();
    let made = all.iter().filter(|s| s.facts.template == name).count();
    let host = actors.host.clone();
    let wanted = name.clone();
    let removed = blocking(move || {
        if !host.snapshots.has_name(&wanted) {
            return Ok(Removed::Unknown);
        }
        if made > 0 && !force {
            return Ok(Removed::InUse);
        }
        host.snapshots.unname(&wanted)?;
        Ok(Removed::Done)
    });
    match removed.await.map_err(|e| ConnectError::from(&e))? {
        Removed::Done => {
            actors.collect_snapshots();
            Ok(())
        }
        Removed::Unknown => Err(ConnectError::not_found(format!(
            "there is no snapshot `{name}`"
        ))),
        Removed::InUse => Err(ConnectError::failed_precondition(format!(
            "snapshot `{name}` is in use by {made} sandboxes; destroy them first"
        ))),
    }
}

enum Removed {
    Done,
    Unknown,
    InUse,
}

/// Creates copies of a sandbox from a new snapshot of it: all of them, or none.
pub(super) async fn fork(
    actors: &SandboxActors,
    sandbox: &Sandbox,
    request: pb::ForkSandboxRequest,
) -> Result<pb::ForkSandboxResponse, ConnectError> {
    let count = request.copy_ids.len();
    if count == 0 || count > MAX_COPIES {
        return Err(ConnectError::invalid_argument(format!(
            "`copy_ids`: {count} copies requested, expected 1 to {MAX_COPIES}"
        )));
    }
    let mut ids = Vec::new();
    for id in &request.copy_ids {
        ids.push(parse::<SandboxId>("copy_ids", id)?);
    }
    let pin = sandbox.freeze().await?;
    let host = actors.host.clone();
    let found = blocking(move || {
        let facts = host::HostCapacity::read(&host.config.data_dir).map_err(CreateError::Host)?;
        Ok((facts, host.snapshots.locate(&pin)?))
    });
    let (facts, snapshot) = found.await.map_err(|e| ConnectError::from(&e))?;
    let copies = make_copies(actors, sandbox, &facts, &snapshot, ids).await?;
    Ok(pb::ForkSandboxResponse {
        copies: copies.iter().map(|copy| sandbox_info(copy)).collect(),
        ..Default::default()
    })
}

async fn make_copies(
    actors: &SandboxActors,
    sandbox: &Sandbox,
    facts: &host::HostCapacity,
    snapshot: &LocatedSnapshot,
    ids: Vec<SandboxId>,
) -> Result<Vec<Arc<Sandbox>>, ConnectError> {
    let mut begun = Vec::new();
    let mut error = None;
    for id in ids {
        let wanted = CreateParams {
            id,
            template_name: sandbox.facts.template.clone(),
            timeout_sec: sandbox.facts.timeout_sec,
            access: sandbox.access(),
            envs: BTreeMap::new(),
            installation: sandbox.installation(),
        };
        let plan = wanted.with_snapshot(facts, snapshot.clone());
        match plan.and_then(|plan| lifecycle::begin_plan(actors, plan)) {
            Ok(copy) => begun.push(copy),
            Err(failed) => {
                error = Some(failed);
                break;
            }
        }
    }
    let mut copies = Vec::new();
    for (copy, made) in begun {
        match made.await.unwrap_or(Err(CreateError::Panicked)) {
            Ok(()) => copies.push(copy),
            Err(failed) => error = Some(failed),
        }
    }
    let Some(error) = error else {
        return Ok(copies);
    };
    for copy in copies {
        // A copy that cannot be freed stays listed, in state error.
        let _ = copy.destroy().await;
    }
    Err((&error).into())
}

fn parse<T: std::str::FromStr>(field: &str, text: &str) -> Result<T, ConnectError>
where
    T::Err: std::fmt::Display,
{
    text.parse()
        .map_err(|error| ConnectError::invalid_argument(format!("`{field}`: {error}")))
}
