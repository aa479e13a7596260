//! What an agent does with what an earlier one left, before it serves anybody.
//!
//! | found                                                   | becomes                                              |
//! |---------------------------------------------------------|------------------------------------------------------|
//! | folder without `spec.json`, or with a torn one, and     | removed: its create had not come far                 |
//! | without `snapshot.json`                                 |                                                      |
//! | the same with `snapshot.json`                           | left alone and told in the log: it is not lost       |
//! | something that is there and cannot be read now          | the agent does not start, and says what it is        |
//! | supervisor lives, guest answered once                   | running                                              |
//! | supervisor lives, guest never answered                  | starting, and the boot goes on                       |
//! | supervisor lives, its network is gone                   | ended, then error with the reason                    |
//! | supervisor is dead                                      | error with the reason it left; all else is freed     |
//! | `snapshot.json` says that it did not run on             | paused; a machine that is left is ended: it is of a  |
//! |                                                         | pause that was noted, or of a resume that was not    |
//! | supervisor lives, its machine is frozen, or it is silent | thawed, recovered and running: its pause was not noted |
//! | slot, network or cgroup of ours without a live sandbox  | removed                                              |

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use tokio_util::sync::CancellationToken;
use wrenn_proto::{SandboxId, supervise::SupervisorSpec};

use super::{
    Facts, Running, Sandbox, Start, Tunnels,
    error::{DestroyError, chain},
    now_unix_ms,
    owner::{Adopted, AdoptedMachine, Owners, Pins},
    resources::{HostParts, Resources, free_network},
    spawn,
};
use crate::{
    envd_client::EnvdClient,
    folder::{Folder, FolderError, LastMoment},
    network::{self, NetworkError, access::Access, addresses::Slot, slot::SlotError},
    snapshots::{ImageMemory, PinnedBuild},
    supervisor::{Supervisor, SupervisorError, final_reason},
};

/// Why nothing was adopted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum AdoptError {
    /// A sandbox's folder cannot be read or removed.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// It is not known which networks are whose.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// It is not known whether a sandbox's machine runs, so nothing of it may be freed.
    #[error("could not find out whether the supervisor of {id} lives")]
    Supervisor {
        /// The sandbox.
        id: SandboxId,
        /// The failure.
        source: io::Error,
    },
}

/// Adopts or cleans up everything that an earlier agent of this data directory left.
pub(crate) async fn adopt_all(owners: &Owners) -> Result<(), AdoptError> {
    let host = &owners.host;
    let owned: BTreeSet<(Slot, SandboxId)> = host.slots.owned()?.into_iter().collect();
    let (mut found, mut left) = (Vec::new(), BTreeSet::new());
    for (id, folder) in host.folders.list()? {
        match read(&id, &folder) {
            Ok((spec, last)) => {
                let adopted = examine(host, folder, spec, last, &owned).await;
                let adopted = adopted.map_err(|source| AdoptError::Supervisor {
                    id: id.clone(),
                    source,
                })?;
                found.push((id, adopted));
            }
            Err(error) if error.is_unreadable() => return Err(error.into()),
            Err(error) if folder.was_frozen() => {
                tracing::error!(sandbox_id = %id, error = chain(&error), "a sandbox is left alone: it cannot be used as it is");
                left.insert(id);
            }
            Err(error) => {
                tracing::warn!(sandbox_id = %id, error = chain(&error), "half-made sandbox is removed");
                folder.remove()?;
            }
        }
    }
    // Who was found keeps what is its, dead or alive: its owner frees it.
    let kept: BTreeMap<&SandboxId, Option<Slot>> = found
        .iter()
        .map(|(id, adopted)| (id, adopted.resources.slot))
        .collect();
    if let Err(error) = remove_strays(host, &kept, &left).await {
        tracing::warn!(
            error = chain(&error),
            "something of an earlier agent is left"
        );
    }
    for (_, adopted) in found {
        let (facts, access) = (Facts::from(&*adopted.spec), access_of(&adopted.spec));
        let installation = adopted.folder.read_installation();
        let (sandbox, requests) = Sandbox::new(facts, access, installation, now_unix_ms());
        owners.registry.insert(sandbox.clone());
        spawn(owners, sandbox, requests, Start::Adopted(Box::new(adopted)));
    }
    // What the sandboxes stand on is pinned by now; the rest of an earlier agent's work is garbage.
    owners.collect_snapshots();
    Ok(())
}

fn read(
    id: &SandboxId,
    folder: &Folder,
) -> Result<(SupervisorSpec, Option<LastMoment>), FolderError> {
    let spec = folder.read_spec()?;
    if spec.id != *id {
        let source = serde::de::Error::custom(format!("it is that of {}", spec.id));
        let path = folder.path().to_owned();
        return Err(FolderError::Malformed { path, source });
    }
    Ok((spec, folder.read_last()?))
}

/// What a sandbox may reach. A list that cannot be read lets nothing out: better cut off than let loose.
fn access_of(spec: &SupervisorSpec) -> Access {
    let network = &spec.network;
    Access::parse(network.egress, &network.allow, &network.deny).unwrap_or_else(|error| {
        tracing::warn!(sandbox_id = %spec.id, error = chain(&error), "it may reach nothing");
        Access::default()
    })
}

async fn examine(
    host: &HostParts,
    folder: Folder,
    spec: SupervisorSpec,
    last: Option<LastMoment>,
    owned: &BTreeSet<(Slot, SandboxId)>,
) -> io::Result<Adopted> {
    let mut resources = Resources::none(spec.id.clone());
    resources.folder = Some(folder.clone());
    resources.disk = true;
    resources.cgroup = true;
    // A slot that was freed may be another's by now.
    resources.slot =
        Slot::new(spec.network.slot).filter(|slot| owned.contains(&(*slot, spec.id.clone())));
    let mut pins = Pins {
        origin: None,
        last: last
            .as_ref()
            .and_then(|last| host.snapshots.pin(&last.build)),
    };
    let paused = last.is_some_and(|last| !last.running);
    let machine = match Supervisor::attach(folder.path()).await {
        Ok(supervisor) if paused => {
            resources.supervisor = Some(supervisor.into());
            AdoptedMachine::Paused
        }
        Ok(supervisor) => {
            let restore = spec.restore.as_ref();
            pins.origin = restore.and_then(|restore| host.snapshots.pin(&restore.build));
            let machine = examine_machine(
                host,
                &folder,
                &spec,
                resources.slot,
                &supervisor,
                pins.origin.as_ref(),
            )
            .await;
            resources.supervisor = Some(supervisor.into());
            machine
        }
        Err(error) if !says_that_none_lives(&error) => return Err(error),
        Err(_) if paused => AdoptedMachine::Paused,
        Err(_) => AdoptedMachine::Lost(final_reason(&folder)),
    };
    Ok(Adopted {
        resources,
        folder,
        spec: Box::new(spec),
        machine,
        pins,
    })
}

/// Whether a connection failed because there is nobody, not for want of something on this side.
fn says_that_none_lives(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::NotFound | Kind::ConnectionRefused | Kind::ConnectionReset | Kind::NotConnected
    )
}

async fn examine_machine(
    host: &HostParts,
    folder: &Folder,
    spec: &SupervisorSpec,
    slot: Option<Slot>,
    supervisor: &Supervisor,
    origin: Option<&PinnedBuild>,
) -> AdoptedMachine {
    let verified = match slot {
        Some(slot) => network::verify(slot, &access_of(spec)).await,
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
            tracing::warn!(sandbox_id = %spec.id, error = chain(&error), "network could not be checked");
        }
    }
    // A silent one is busy: a freeze that an earlier supervisor's program does not tell of.
    let stands = match supervisor.status().await {
        Ok(status) => status.frozen,
        Err(SupervisorError::Silent(_)) => true,
        Err(error) => return AdoptedMachine::Lost(chain(&error)),
    };
    let Some(boot) = folder.read_boot() else {
        return AdoptedMachine::Booting;
    };
    let envd = match EnvdClient::new(IpAddr::V4(spec.network.host_ip), &spec.envd_token) {
        Ok(envd) => envd,
        Err(error) => return AdoptedMachine::Lost(chain(&error)),
    };
    let running = Box::new(Running {
        envd,
        boot,
        gone: CancellationToken::new(),
        memory: shared_memory(host, supervisor, origin).await,
        tunnels: Tunnels::default(),
    });
    if stands {
        AdoptedMachine::Frozen(running)
    } else {
        AdoptedMachine::Running(running)
    }
}

/// The image's memory that a supervisor has: those who come after share it.
async fn shared_memory(
    host: &HostParts,
    supervisor: &Supervisor,
    origin: Option<&PinnedBuild>,
) -> Option<std::sync::Arc<ImageMemory>> {
    let fd = supervisor.image_memory().await.ok().flatten()?;
    Some(host.snapshots.adopt_memory(origin?, fd))
}

/// Removes what is ours and belongs to no sandbox.
async fn remove_strays(
    host: &HostParts,
    kept: &BTreeMap<&SandboxId, Option<Slot>>,
    left: &BTreeSet<SandboxId>,
) -> Result<(), DestroyError> {
    host.slots.remove_stale_drafts()?;
    for id in host.cgroups.existing() {
        if !kept.contains_key(&id) && !left.contains(&id) {
            tracing::warn!(sandbox_id = %id, "stray cgroup is removed");
            host.cgroups.remove(&id).await?;
        }
    }
    for (slot, id) in host.slots.owned()? {
        if kept.get(&id).copied().flatten() != Some(slot) && !left.contains(&id) {
            tracing::warn!(sandbox_id = %id, %slot, "stray network is removed");
            free_network(host, slot).await?;
        }
    }
    Ok(())
}
