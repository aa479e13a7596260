//! What an agent does with what an earlier one left, before it serves anybody.
//!
//! | found                                                   | becomes                                              |
//! |---------------------------------------------------------|------------------------------------------------------|
//! | folder without a readable `spec.json`                   | removed: its create had not come far                 |
//! | supervisor lives, guest answered once                   | running                                              |
//! | supervisor lives, guest never answered                  | starting, and the boot goes on                       |
//! | supervisor lives, its network is gone                   | ended, then error with the reason                    |
//! | supervisor is dead                                      | error with the reason it left; all else is freed     |
//! | slot, network or cgroup of ours without a live sandbox  | removed                                              |

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use tokio_util::sync::CancellationToken;
use wrenn_proto::{SandboxId, supervise::SupervisorSpec};

use super::{
    Facts, Running, Sandbox, Start,
    error::{DestroyError, chain},
    now_unix_ms,
    owner::{Adopted, AdoptedMachine, Owners},
    resources::{HostParts, Resources, free_network},
    spawn,
};
use crate::{
    envd_client::EnvdClient,
    folder::{Folder, FolderError},
    network::{self, NetworkError, addresses::Slot},
    supervisor::{Supervisor, final_reason},
};

/// Adopts or cleans up everything that an earlier agent of this data directory left.
pub(crate) async fn adopt_all(owners: &Owners) -> Result<(), FolderError> {
    let host = &owners.host;
    let owned: BTreeSet<(Slot, SandboxId)> = match host.slots.owned() {
        Ok(owned) => owned.into_iter().collect(),
        Err(error) => {
            tracing::warn!(error = chain(&error), "network slots cannot be read");
            BTreeSet::new()
        }
    };
    let mut found = Vec::new();
    for (id, folder) in host.folders.list()? {
        match read_spec(&id, &folder) {
            Ok(spec) => found.push((id, examine(folder, spec, &owned).await)),
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
    if let Err(error) = remove_strays(host, &kept).await {
        tracing::warn!(
            error = chain(&error),
            "something of an earlier agent is left"
        );
    }
    for (_, adopted) in found {
        let (sandbox, requests) = Sandbox::new(Facts::from(&*adopted.spec), now_unix_ms());
        owners.registry.insert(sandbox.clone());
        spawn(owners, sandbox, requests, Start::Adopted(adopted));
    }
    Ok(())
}

fn read_spec(id: &SandboxId, folder: &Folder) -> Result<SupervisorSpec, FolderError> {
    let spec = folder.read_spec()?;
    if spec.id != *id {
        let source = serde::de::Error::custom(format!("it is that of {}", spec.id));
        let path = folder.path().to_owned();
        return Err(FolderError::Malformed { path, source });
    }
    Ok(spec)
}

async fn examine(
    folder: Folder,
    spec: SupervisorSpec,
    owned: &BTreeSet<(Slot, SandboxId)>,
) -> Adopted {
    let mut resources = Resources::none(spec.id.clone());
    resources.folder = Some(folder.clone());
    resources.disk = true;
    resources.cgroup = true;
    // A slot that was freed may be another's by now.
    resources.slot =
        Slot::new(spec.network.slot).filter(|slot| owned.contains(&(*slot, spec.id.clone())));
    let machine = match Supervisor::attach(folder.path()).await {
        Ok(supervisor) => {
            resources.supervisor = Some(supervisor);
            examine_machine(&folder, &spec, resources.slot).await
        }
        Err(_) => AdoptedMachine::Lost(final_reason(&folder)),
    };
    Adopted {
        resources,
        folder,
        spec: Box::new(spec),
        machine,
    }
}

async fn examine_machine(
    folder: &Folder,
    spec: &SupervisorSpec,
    slot: Option<Slot>,
) -> AdoptedMachine {
    let verified = match slot {
        Some(slot) => network::verify(slot, spec.network.egress).await,
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
    let Some(boot) = folder.read_boot() else {
        return AdoptedMachine::Booting;
    };
    match EnvdClient::new(IpAddr::V4(spec.network.host_ip), &spec.envd_token) {
        Ok(envd) => AdoptedMachine::Running(Box::new(Running {
            envd,
            boot,
            gone: CancellationToken::new(),
        })),
        Err(error) => AdoptedMachine::Lost(chain(&error)),
    }
}

/// Removes what is ours and belongs to no sandbox.
async fn remove_strays(
    host: &HostParts,
    kept: &BTreeMap<&SandboxId, Option<Slot>>,
) -> Result<(), DestroyError> {
    host.slots.remove_stale_drafts()?;
    for id in host.cgroups.existing() {
        if !kept.contains_key(&id) {
            tracing::warn!(sandbox_id = %id, "stray cgroup is removed");
            host.cgroups.remove(&id).await?;
        }
    }
    for (slot, id) in host.slots.owned()? {
        if kept.get(&id).copied().flatten() != Some(slot) {
            tracing::warn!(sandbox_id = %id, %slot, "stray network is removed");
            free_network(host, slot).await?;
        }
    }
    Ok(())
}
