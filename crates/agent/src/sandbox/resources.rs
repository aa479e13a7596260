//! What a sandbox has on the host, and how it is given back.
//!
//! Each part is noted before it is made and forgotten after it is freed, and freeing what was made only in part, or not at
//! all, is fine: so at any moment, of a create too, [`Resources::free`] leaves nothing, and may be called again for what
//! could not be freed.

use std::sync::Arc;

use wrenn_proto::SandboxId;

use super::error::DestroyError;
use crate::{
    cgroup::{CgroupError, Cgroups, kill_processes_of},
    disk,
    folder::{Folder, Folders},
    network::{self, addresses::Slot, slot::Slots},
    snapshots::Snapshots,
    supervisor::Supervisor,
    templates::TemplateSource,
};

/// What sandboxes are made with on this host.
pub(crate) struct HostParts {
    pub(crate) config: crate::AgentConfig,
    pub(crate) templates: Arc<dyn TemplateSource>,
    pub(crate) deadlines: crate::Deadlines,
    pub(crate) folders: Folders,
    pub(crate) slots: Slots,
    pub(crate) cgroups: Cgroups,
    pub(crate) snapshots: Arc<Snapshots>,
    /// How fast this host's time stamp counter counts.
    pub(crate) tsc_khz: u32,
}

/// What one sandbox has.
#[derive(Debug)]
pub(super) struct Resources {
    id: SandboxId,
    pub(super) folder: Option<Folder>,
    pub(super) slot: Option<Slot>,
    pub(super) cgroup: bool,
    pub(super) disk: bool,
    pub(super) supervisor: Option<Supervisor>,
}

impl Resources {
    /// Of a sandbox that has nothing yet.
    pub(super) fn none(id: SandboxId) -> Self {
        Self {
            id,
            folder: None,
            slot: None,
            cgroup: false,
            disk: false,
            supervisor: None,
        }
    }

    /// Ends the machine and frees everything but the folder. The first failure is reported, after all was tried.
    pub(super) async fn free(&mut self, host: &HostParts) -> Result<(), DestroyError> {
        let mut first = Ok(());
        let mut note = |result: Result<(), DestroyError>| {
            let done = result.is_ok();
            if let Err(error) = result {
                tracing::warn!(error = super::error::chain(&error), "could not free all");
                if first.is_ok() {
                    first = Err(error);
                }
            }
            done
        };
        if let Some(supervisor) = &self.supervisor
            && note(
                supervisor
                    .stop(host.deadlines.stop)
                    .await
                    .map_err(Into::into),
            )
        {
            self.supervisor = None;
        }
        // The machine's processes go before what they use: a network in use would live on without a name.
        if note(self.kill_processes(host).await.map_err(Into::into)) {
            self.cgroup = false;
        }
        if self.disk
            && let Some(folder) = &self.folder
            && note(disk::remove(folder).map_err(Into::into))
        {
            self.disk = false;
        }
        if let Some(slot) = self.slot
            && note(free_network(host, slot).await)
        {
            self.slot = None;
        }
        first
    }

    /// Frees everything, the folder last, and only if all else is freed: it is what the next agent finds the rest by.
    pub(super) async fn free_all(&mut self, host: &HostParts) -> Result<(), DestroyError> {
        self.free(host).await?;
        if let Some(folder) = &self.folder {
            folder.remove()?;
            self.folder = None;
        }
        Ok(())
    }

    async fn kill_processes(&self, host: &HostParts) -> Result<(), CgroupError> {
        if self.cgroup {
            host.cgroups.remove(&self.id).await?;
        }
        if host.cgroups.are_missing()
            && let Some(slot) = self.slot
        {
            kill_processes_of(slot.uid()).await?;
        }
        Ok(())
    }
}

/// Removes a network, then gives its slot back: until then the slot says whose the network is.
pub(super) async fn free_network(host: &HostParts, slot: Slot) -> Result<(), DestroyError> {
    network::remove(slot).await?;
    host.slots.release(slot).map_err(DestroyError::Slot)
}
