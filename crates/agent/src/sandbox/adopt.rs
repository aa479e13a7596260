//! Adoption of everything that an earlier agent left.
//!
//! [`adopt_all`] reads the directories before this agent accepts calls, so that every sandbox is
//! known, and every snapshot that it depends on is kept. It asks no supervisor. Each sandbox's
//! actor then examines its own VM ([`SandboxActor::examine`]), at most [`MAX_AT_ONCE`] at the same
//! time. A supervisor that hangs therefore delays its own sandbox only. Until a VM is examined, the
//! sandbox is `starting`; tunnels and calls to it wait ([`Sandbox::until_examined`]).
//!
//! | found                                            | result                                  |
//! |--------------------------------------------------|-----------------------------------------|
//! | directory whose `spec.json` is missing or        | removed: its create was at an early     |
//! | incomplete, without `snapshot.json`              | step                                    |
//! | the same with `snapshot.json`                    | left alone and logged: it is not lost   |
//! | file that exists and cannot be read now          | agent does not start, names the file    |
//! | supervisor alive, guest has answered once        | running; the guest is notified that it  |
//! |                                                  | continues                               |
//! | supervisor alive, guest has never answered       | starting, and the boot continues        |
//! | supervisor alive, network missing                | VM ended, then as with a dead           |
//! |                                                  | supervisor                              |
//! | supervisor dead                                  | error with the reason that it left, or  |
//! |                                                  | paused if the sandbox has a snapshot;   |
//! |                                                  | everything else is freed                |
//! | supervisor cannot be reached for another reason  | starting, with a warning; tried again,  |
//! |                                                  | after 1 s at first, then up to 30 s.    |
//! |                                                  | Nothing is freed meanwhile. A supervisor |
//! |                                                  | that hangs for ten minutes is killed    |
//! | `snapshot.json` says that the sandbox does not   | paused; a remaining VM is ended: it     |
//! | run                                              | belongs to a pause that was recorded,   |
//! |                                                  | or to a resume that was not             |
//! | supervisor alive, VM paused or supervisor silent | pausing: VM resumed, guest recovered,   |
//! |                                                  | running: the pause was not recorded. A  |
//! |                                                  | supervisor that stays silent for ten    |
//! |                                                  | minutes is killed: the VM is lost       |
//! | any of these, destroyed by a client meanwhile    | supervisor and VM ended, removed        |
//! | slot, network or cgroup of this data directory   | removed, all at the same time, for at   |
//! | that belongs to no sandbox                       | most 20 s; left to the next agent       |
//! |                                                  | beyond that                             |

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream};
use thiserror_ext::AsReport as _;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use wrenn_model::SandboxId;
use wrenn_proto::supervise::SupervisorSpec;

use super::{
    Running, Sandbox, SandboxFacts, Start,
    actor::{Adopted, AdoptedMachine, Pins, SandboxActor, SandboxActors},
    boot::guest_client,
    error::{DestroyError, LifecycleError},
    now_unix_ms,
    resources::{HostContext, Resources, free_network},
    spawn,
};
use crate::{
    cgroup::kill_processes_of,
    network::{NetworkError, addresses::Slot, egress::Access, slot::SlotError},
    sandbox_dir::{LastSnapshot, SandboxDir, SandboxDirError},
    snapshots::{ImageMemory, SnapshotRef},
    supervisor::{Supervisor, SupervisorError, final_reason, is_no_supervisor},
};

/// Maximum number of sandboxes whose networks are checked at the same time. A check starts programs
/// and opens files. Waiting for a supervisor needs no permit: supervisors that hang would use up all
/// of them.
pub(crate) const MAX_AT_ONCE: usize = 32;

/// Delay before the second attempt to reach a supervisor. Each further delay is twice as long.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// Maximum delay between two attempts.
const MAX_RETRY: Duration = Duration::from_secs(30);

/// Time for which a supervisor may hang before its VM is ended.
const MAX_SILENCE: Duration = Duration::from_secs(600);

/// Maximum time for the removal of resources that belong to no sandbox. The service must listen
/// soon, and a process that cannot be killed may keep its cgroup for ever.
const STRAYS_DEADLINE: Duration = Duration::from_secs(20);

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
}

/// Registers everything that an earlier agent of this data directory left, and starts the actors,
/// which examine the VMs. Removes what belongs to no sandbox.
pub(crate) async fn adopt_all(actors: &SandboxActors) -> Result<(), AdoptError> {
    let host = &actors.host;
    let owned: BTreeSet<(Slot, SandboxId)> = host.slots.owned()?.into_iter().collect();
    let (mut found, mut left) = (Vec::new(), BTreeSet::new());
    for (id, sandbox_dir) in host.sandbox_dirs.list()? {
        match read(&id, &sandbox_dir) {
            Ok((spec, last)) => found.push((id, adopted(host, sandbox_dir, spec, last, &owned))),
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
    let removed = timeout(STRAYS_DEADLINE, remove_strays(host, &kept, &left)).await;
    if let Err(error) = removed.unwrap_or(Err(StraysError::TimedOut)) {
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

/// Returns a sandbox as its directory describes it. Its VM is not known yet.
fn adopted(
    host: &HostContext,
    sandbox_dir: SandboxDir,
    spec: SupervisorSpec,
    last: Option<LastSnapshot>,
    owned: &BTreeSet<(Slot, SandboxId)>,
) -> Adopted {
    let mut resources = Resources::none(spec.id.clone());
    resources.sandbox_dir = Some(sandbox_dir.clone());
    resources.disk = true;
    resources.cgroup = true;
    resources.may_be_supervised = true;
    // A slot that was freed may belong to another sandbox by now.
    resources.slot =
        Slot::new(spec.network.slot).filter(|slot| owned.contains(&(*slot, spec.id.clone())));
    let pin = |build: &str| host.snapshots.pin(build);
    let pins = Pins {
        origin: spec.restore.as_ref().and_then(|from| pin(&from.build)),
        last: last.as_ref().and_then(|last| pin(&last.build)),
    };
    let is_paused = last.is_some_and(|last| !last.running);
    if !is_paused {
        // A VM that exists: its memory is not promised to another one until its end is known.
        resources.memory = Some(host.memory.adopt(spec.size.memory_mib));
    }
    Adopted {
        resources,
        sandbox_dir,
        spec: Box::new(spec),
        is_paused,
        pins,
    }
}

impl SandboxActor {
    /// Determines the state of the VM of an adopted sandbox. Repeats this until the state is known.
    ///
    /// # Errors
    /// If the sandbox is being destroyed.
    pub(super) async fn examine(
        &mut self,
        sandbox_dir: &SandboxDir,
        spec: &SupervisorSpec,
        is_paused: bool,
    ) -> Result<AdoptedMachine, LifecycleError> {
        let sandbox = self.sandbox.clone();
        let mut delay = FIRST_RETRY;
        // Since when the supervisor has not taken a connection.
        let mut hangs_since = None;
        loop {
            let attempt = async { Ok(self.examine_once(sandbox_dir, spec, is_paused).await) };
            match sandbox.unless_destroyed(attempt).await? {
                Ok(machine) => return Ok(machine),
                Err(error) => {
                    tracing::error!(
                        error = error.to_report_string(),
                        "VM not examined, retrying"
                    );
                    sandbox.set_warning(error.to_report_string());
                    if !error.is_silence() {
                        hangs_since = None;
                    } else if hangs_since.get_or_insert_with(Instant::now).elapsed() > MAX_SILENCE {
                        let reason = "its supervisor did not answer for ten minutes";
                        return Ok(AdoptedMachine::Lost(reason.to_owned()));
                    }
                }
            }
            let pause = async {
                tokio::time::sleep(delay).await;
                Ok(())
            };
            sandbox.unless_destroyed(pause).await?;
            delay = (delay * 2).min(MAX_RETRY);
        }
    }

    async fn examine_once(
        &mut self,
        sandbox_dir: &SandboxDir,
        spec: &SupervisorSpec,
        is_paused: bool,
    ) -> Result<AdoptedMachine, SupervisorError> {
        let host = self.actors.host.clone();
        match Supervisor::attach(sandbox_dir.path()).await {
            Ok(supervisor) => self.resources.supervisor = Some(supervisor.into()),
            Err(error) if is_no_supervisor(&error) => {}
            Err(error) => return Err(SupervisorError::unreachable(error)),
        }
        self.resources.may_be_supervised = false;
        let Some(supervisor) = self.resources.supervisor.clone() else {
            self.pins.origin = None;
            return Ok(match is_paused {
                true => AdoptedMachine::Paused,
                false => AdoptedMachine::Lost(final_reason(sandbox_dir)),
            });
        };
        let memory = &mut self.resources.memory;
        memory.get_or_insert_with(|| host.memory.adopt(spec.size.memory_mib));
        if is_paused {
            return Ok(AdoptedMachine::Paused);
        }
        let (slot, origin) = (self.resources.slot, self.pins.origin.as_ref());
        let sandbox = &self.sandbox;
        examine_machine(&host, sandbox, sandbox_dir, spec, slot, &supervisor, origin).await
    }
}

async fn examine_machine(
    host: &HostContext,
    sandbox: &Sandbox,
    sandbox_dir: &SandboxDir,
    spec: &SupervisorSpec,
    slot: Option<Slot>,
    supervisor: &Supervisor,
    origin: Option<&SnapshotRef>,
) -> Result<AdoptedMachine, SupervisorError> {
    match verify_network(host, spec, slot).await {
        Ok(()) => {}
        Err(error @ NetworkError::Missing(_)) => {
            return Ok(AdoptedMachine::Lost(format!(
                "{error}; it was removed while the host agent was down"
            )));
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
        // The VM may be alive: for example, this process has no descriptor left.
        Err(SupervisorError::Io { step, source }) if !is_no_supervisor(&source) => {
            return Err(SupervisorError::Io { step, source });
        }
        Err(error) => return Ok(AdoptedMachine::Lost(error.to_report_string())),
    };
    let Some(boot) = sandbox_dir.read_boot() else {
        return Ok(AdoptedMachine::Booting);
    };
    let envd = match guest_client(sandbox, spec) {
        Ok(envd) => envd,
        Err(error) => return Ok(AdoptedMachine::Lost(error.to_report_string())),
    };
    let running = Box::new(Running {
        envd,
        boot,
        cpu: spec.cpu(),
        accel: spec.accel,
        gone: CancellationToken::new(),
        memory: shared_memory(host, supervisor, origin).await,
    });
    Ok(match is_paused {
        true => AdoptedMachine::Interrupted(running),
        false => AdoptedMachine::Running(running),
    })
}

async fn verify_network(
    host: &HostContext,
    spec: &SupervisorSpec,
    slot: Option<Slot>,
) -> Result<(), NetworkError> {
    let slot = slot.ok_or(NetworkError::Missing("network slot"))?;
    // Never closed.
    let _permit = host.adoptions.acquire().await.ok();
    host.network.verify(slot, &access_of(spec)).await
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

/// Failure to remove the resources that belong to no sandbox.
#[derive(Debug, thiserror::Error)]
enum StraysError {
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error("not done within {STRAYS_DEADLINE:?}")]
    TimedOut,
}

/// Removes slots, networks and cgroups of this data directory that belong to no sandbox. A failure
/// to remove the resources of one sandbox is logged, and concerns no other one.
async fn remove_strays(
    host: &HostContext,
    kept: &BTreeMap<&SandboxId, Option<Slot>>,
    left: &BTreeSet<SandboxId>,
) -> Result<(), StraysError> {
    host.slots.remove_stale_drafts()?;
    let mut strays: BTreeMap<SandboxId, Stray> = BTreeMap::new();
    for id in host.cgroups.existing() {
        if !kept.contains_key(&id) && !left.contains(&id) {
            strays.entry(id).or_default().cgroup = true;
        }
    }
    for (slot, id) in host.slots.owned()? {
        if kept.get(&id).copied().flatten() != Some(slot) && !left.contains(&id) {
            strays.entry(id).or_default().slots.push(slot);
        }
    }
    let removals = stream::iter(strays).for_each_concurrent(MAX_AT_ONCE, |(id, stray)| async move {
        tracing::warn!(sandbox_id = %id, ?stray, "removing stray resources");
        if let Err(error) = remove_stray(host, &id, &stray).await {
            tracing::warn!(sandbox_id = %id, error = error.to_report_string(), "failed to remove stray resources");
        }
    });
    removals.await;
    Ok(())
}

/// Resources that belong to no sandbox.
#[derive(Debug, Default)]
struct Stray {
    cgroup: bool,
    slots: Vec<Slot>,
}

/// Removes the resources of a sandbox that does not exist. As long as a process of its VM exists,
/// its slots stay claimed.
async fn remove_stray(
    host: &HostContext,
    id: &SandboxId,
    stray: &Stray,
) -> Result<(), DestroyError> {
    if stray.cgroup {
        host.cgroups.remove(id).await?;
    }
    for slot in &stray.slots {
        if host.cgroups.are_missing() {
            kill_processes_of(*slot).await?;
        }
        free_network(host, *slot).await?;
    }
    Ok(())
}
