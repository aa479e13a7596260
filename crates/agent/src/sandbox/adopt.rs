//! Adoption of everything that an earlier agent left, before this agent accepts calls.
//!
//! | found                                            | result                                  |
//! |--------------------------------------------------|-----------------------------------------|
//! | directory whose `spec.json` is missing or        | removed: its create was at an early     |
//! | incomplete, without `snapshot.json`              | step                                    |
//! | the same with `snapshot.json`                    | left alone and logged: it is not lost   |
//! | file that exists and cannot be read now          | agent does not start, names the file    |
//! | supervisor alive, guest has answered once        | running                                 |
//! | supervisor alive, guest has never answered       | starting, and the boot continues        |
//! | supervisor alive, network missing                | VM ended, then as with a dead           |
//! |                                                  | supervisor                              |
//! | supervisor dead                                  | error with the reason that it left, or  |
//! |                                                  | paused if the sandbox has a snapshot;   |
//! |                                                  | everything else is freed                |
//! | `snapshot.json` says that the sandbox does not   | paused; a remaining VM is ended: it     |
//! | run                                              | belongs to a pause that was recorded,   |
//! |                                                  | or to a resume that was not             |
//! | supervisor alive, VM paused or supervisor silent | VM resumed, guest recovered, running:   |
//! |                                                  | the pause was not recorded              |
//! | slot, network or cgroup of this data directory   | removed                                 |
//! | that belongs to no sandbox                       |                                         |

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use thiserror_ext::AsReport as _;
use tokio_util::sync::CancellationToken;
use wrenn_model::SandboxId;
use wrenn_proto::supervise::SupervisorSpec;

use super::{
    Running, Sandbox, SandboxFacts, Start, Tunnels,
    actor::{Adopted, AdoptedMachine, Pins, SandboxActors},
    boot::guest_client,
    error::DestroyError,
    now_unix_ms,
    resources::{HostContext, Resources, free_network},
    spawn,
};
use crate::{
    network::{NetworkError, addresses::Slot, egress::Access, slot::SlotError},
    sandbox_dir::{LastSnapshot, SandboxDir, SandboxDirError},
    snapshots::{ImageMemory, SnapshotRef},
    supervisor::{Supervisor, SupervisorError, final_reason},
};

/// Failure to adopt the sandboxes of an earlier agent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum AdoptError {
    /// The directory of a sandbox cannot be read or removed.
    #[error(transparent)]
    SandboxDir(#[from] SandboxDirError),
    /// The assignment of networks to sandboxes cannot be read.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The state of a sandbox's VM cannot be determined, so none of its resources may be freed.
    #[error("failed to determine whether the supervisor of sandbox {id} is alive")]
    Supervisor {
        /// Sandbox.
        id: SandboxId,
        /// Cause.
        source: io::Error,
    },
}

/// Adopts or cleans up everything that an earlier agent of this data directory left.
pub(crate) async fn adopt_all(actors: &SandboxActors) -> Result<(), AdoptError> {
    let host = &actors.host;
    let owned: BTreeSet<(Slot, SandboxId)> = host.slots.owned()?.into_iter().collect();
    let (mut found, mut left) = (Vec::new(), BTreeSet::new());
    for (id, sandbox_dir) in host.sandbox_dirs.list()? {
        match read(&id, &sandbox_dir) {
            Ok((spec, last)) => {
                let adopted = examine(host, sandbox_dir, spec, last, &owned).await;
                let adopted = adopted.map_err(|source| AdoptError::Supervisor {
                    id: id.clone(),
                    source,
                })?;
                found.push((id, adopted));
            }
            Err(error) if error.is_unreadable() => return Err(error.into()),
            Err(error) if sandbox_dir.has_last_snapshot() => {
                tracing::error!(sandbox_id = %id, error = error.to_report_string(), "directory of a sandbox is invalid, sandbox left alone");
                left.insert(id);
            }
            Err(error) => {
                tracing::warn!(sandbox_id = %id, error = error.to_report_string(), "removing incomplete sandbox");
                sandbox_dir.remove()?;
            }
        }
    }
    // Resources of an adopted sandbox are kept, whether its VM is alive or not. Its actor frees
    // them.
    let kept: BTreeMap<&SandboxId, Option<Slot>> = found
        .iter()
        .map(|(id, adopted)| (id, adopted.resources.slot))
        .collect();
    if let Err(error) = remove_strays(host, &kept, &left).await {
        tracing::warn!(
            error = error.to_report_string(),
            "failed to remove everything that an earlier agent left"
        );
    }
    for (_, adopted) in found {
        let (facts, access) = (SandboxFacts::from(&*adopted.spec), access_of(&adopted.spec));
        let installation = adopted.sandbox_dir.read_installation();
        let (sandbox, requests) = Sandbox::new(facts, access, installation, now_unix_ms());
        actors.registry.insert(sandbox.clone());
        spawn(actors, sandbox, requests, Start::Adopted(Box::new(adopted)));
    }
    // All snapshots that the sandboxes depend on are pinned now. Any others are garbage of an
    // earlier agent.
    actors.collect_snapshots();
    Ok(())
}

fn read(
    id: &SandboxId,
    sandbox_dir: &SandboxDir,
) -> Result<(SupervisorSpec, Option<LastSnapshot>), SandboxDirError> {
    let spec = sandbox_dir.read_spec()?;
    if spec.id != *id {
        let source =
            serde::de::Error::custom(format!("the specification belongs to sandbox {}", spec.id));
        let path = sandbox_dir.path().to_owned();
        return Err(SandboxDirError::Malformed { path, source });
    }
    Ok((spec, sandbox_dir.read_last()?))
}

/// Returns the addresses that a sandbox may reach. If a list is invalid, the sandbox may reach
/// nothing, because too little access is safer than too much.
fn access_of(spec: &SupervisorSpec) -> Access {
    let network = &spec.network;
    Access::parse(network.egress, &network.allow, &network.deny).unwrap_or_else(|error| {
        tracing::warn!(sandbox_id = %spec.id, error = error.to_report_string(), "egress lists invalid, denying all egress");
        Access::default()
    })
}

async fn examine(
    host: &HostContext,
    sandbox_dir: SandboxDir,
    spec: SupervisorSpec,
    last: Option<LastSnapshot>,
    owned: &BTreeSet<(Slot, SandboxId)>,
) -> io::Result<Adopted> {
    let mut resources = Resources::none(spec.id.clone());
    resources.sandbox_dir = Some(sandbox_dir.clone());
    resources.disk = true;
    resources.cgroup = true;
    // A slot that was freed may belong to another sandbox by now.
    resources.slot =
        Slot::new(spec.network.slot).filter(|slot| owned.contains(&(*slot, spec.id.clone())));
    let mut pins = Pins {
        origin: None,
        last: last
            .as_ref()
            .and_then(|last| host.snapshots.pin(&last.build)),
    };
    let paused = last.is_some_and(|last| !last.running);
    let machine = match Supervisor::attach(sandbox_dir.path()).await {
        Ok(supervisor) if paused => {
            resources.supervisor = Some(supervisor.into());
            AdoptedMachine::Paused
        }
        Ok(supervisor) => {
            let restore = spec.restore.as_ref();
            pins.origin = restore.and_then(|restore| host.snapshots.pin(&restore.build));
            let machine = examine_machine(
                host,
                &sandbox_dir,
                &spec,
                resources.slot,
                &supervisor,
                pins.origin.as_ref(),
            )
            .await;
            resources.supervisor = Some(supervisor.into());
            machine
        }
        Err(error) if !is_no_supervisor(&error) => return Err(error),
        Err(_) if paused => AdoptedMachine::Paused,
        Err(_) => AdoptedMachine::Lost(final_reason(&sandbox_dir)),
    };
    Ok(Adopted {
        resources,
        sandbox_dir,
        spec: Box::new(spec),
        machine,
        pins,
    })
}

/// True if a connection failed because no supervisor is running, and not because this process lacks
/// a resource.
fn is_no_supervisor(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::NotFound | Kind::ConnectionRefused | Kind::ConnectionReset | Kind::NotConnected
    )
}

async fn examine_machine(
    host: &HostContext,
    sandbox_dir: &SandboxDir,
    spec: &SupervisorSpec,
    slot: Option<Slot>,
    supervisor: &Supervisor,
    origin: Option<&SnapshotRef>,
) -> AdoptedMachine {
    let verified = match slot {
        Some(slot) => host.network.verify(slot, &access_of(spec)).await,
        None => Err(NetworkError::Missing("network slot")),
    };
    match verified {
        Ok(()) => {}
        Err(error @ NetworkError::Missing(_)) => {
            return AdoptedMachine::Lost(format!(
                "{error}; it was removed while the host agent was down"
            ));
        }
        Err(error) => {
            tracing::warn!(sandbox_id = %spec.id, error = error.to_report_string(), "failed to check the network");
        }
    }
    // A supervisor that does not answer is busy with a snapshot, which an older version of it does
    // not report.
    let is_paused = match supervisor.status().await {
        Ok(status) => status.paused,
        Err(SupervisorError::Silent(_)) => true,
        Err(error) => return AdoptedMachine::Lost(error.to_report_string()),
    };
    let Some(boot) = sandbox_dir.read_boot() else {
        return AdoptedMachine::Booting;
    };
    let envd = match guest_client(spec) {
        Ok(envd) => envd,
        Err(error) => return AdoptedMachine::Lost(error.to_report_string()),
    };
    let running = Box::new(Running {
        envd,
        boot,
        cpu: spec.cpu(),
        gone: CancellationToken::new(),
        memory: shared_memory(host, supervisor, origin).await,
        tunnels: Tunnels::default(),
    });
    if is_paused {
        AdoptedMachine::Interrupted(running)
    } else {
        AdoptedMachine::Running(running)
    }
}

/// Returns the memory file of the snapshot that a supervisor holds, so that later VMs share it.
async fn shared_memory(
    host: &HostContext,
    supervisor: &Supervisor,
    origin: Option<&SnapshotRef>,
) -> Option<std::sync::Arc<ImageMemory>> {
    let fd = supervisor.image_memory().await.ok().flatten()?;
    Some(host.snapshots.adopt_memory(origin?, fd))
}

/// Removes slots, networks and cgroups of this data directory that belong to no sandbox.
async fn remove_strays(
    host: &HostContext,
    kept: &BTreeMap<&SandboxId, Option<Slot>>,
    left: &BTreeSet<SandboxId>,
) -> Result<(), DestroyError> {
    host.slots.remove_stale_drafts()?;
    for id in host.cgroups.existing() {
        if !kept.contains_key(&id) && !left.contains(&id) {
            tracing::warn!(sandbox_id = %id, "removing stray cgroup");
            host.cgroups.remove(&id).await?;
        }
    }
    for (slot, id) in host.slots.owned()? {
        if kept.get(&id).copied().flatten() != Some(slot) && !left.contains(&id) {
            tracing::warn!(sandbox_id = %id, %slot, "removing stray network");
            free_network(host, slot).await?;
        }
    }
    Ok(())
}
