//! Host resources of a sandbox, and their release.
//!
//! Each resource is recorded before it is created and cleared after it is freed. Freeing a resource
//! that was created only partially, or not at all, succeeds. [`Resources::free`] may therefore be
//! called at any time, also during a create, leaves nothing behind, and may be called again for
//! resources that could not be freed.

use std::sync::Arc;

use thiserror_ext::AsReport as _;
use tokio::sync::Semaphore;
use wrenn_disk::DiskError;
use wrenn_model::SandboxId;
use wrenn_proto::supervise::{DiskRate, files};
use wrenn_sys::failpoint;

use super::{Boots, error::DestroyError};
use crate::{
    cgroup::{CgroupError, Cgroups, kill_processes_of},
    disk,
    disk_space::DiskSpace,
    memory_ledger::{MemoryLedger, MemoryReservation},
    network::{HostNetwork, addresses::Slot, slot::Slots},
    sandbox_dir::{SandboxDir, SandboxDirs},
    sandbox_logs::SandboxLogs,
    snapshots::Snapshots,
    supervisor::{Supervisor, SupervisorError, is_no_supervisor},
    templates::TemplateSource,
};

/// Environment that sandboxes on this host are created in.
pub(crate) struct HostContext {
    pub(crate) config: crate::AgentConfig,
    pub(crate) templates: Arc<dyn TemplateSource>,
    pub(crate) deadlines: crate::Deadlines,
    pub(crate) sandbox_dirs: SandboxDirs,
    pub(crate) network: Arc<HostNetwork>,
    pub(crate) slots: Slots,
    pub(crate) cgroups: Cgroups,
    pub(crate) memory: Arc<MemoryLedger>,
    pub(crate) disk_space: DiskSpace,
    pub(crate) snapshots: Arc<Snapshots>,
    /// Frequency of this host's time stamp counter, in kHz.
    pub(crate) tsc_khz: u32,
    pub(crate) boots: Boots,
    /// Permits to check the network of an adopted sandbox.
    pub(crate) adoptions: Semaphore,
    /// Turns of compactions that no caller waits for.
    pub(crate) background_compactions: Semaphore,
    /// Identifies the data directory.
    pub(crate) id: String,
}

impl HostContext {
    /// Returns the limits of a guest's disk requests.
    pub(super) fn disk_rate(&self) -> DiskRate {
        let limits = &self.config.limits.sandbox;
        DiskRate {
            bytes_per_sec: u64::from(limits.disk_mib_per_sec) * 1024 * 1024,
            ops_per_sec: u64::from(limits.disk_ops_per_sec),
        }
    }
}

/// Resources of one sandbox.
#[derive(Debug)]
pub(super) struct Resources {
    id: SandboxId,
    /// Memory that is reserved for the VM.
    pub(super) memory: Option<MemoryReservation>,
    pub(super) sandbox_dir: Option<SandboxDir>,
    pub(super) slot: Option<Slot>,
    pub(super) cgroup: bool,
    pub(super) disk: bool,
    pub(super) supervisor: Option<Arc<Supervisor>>,
    /// True if a supervisor may be running that is not connected to: an earlier agent started it,
    /// or it did not become ready.
    pub(super) may_be_supervised: bool,
}

impl Resources {
    /// Returns the resources of a sandbox that has none yet.
    pub(super) fn none(id: SandboxId) -> Self {
        Self {
            id,
            memory: None,
            sandbox_dir: None,
            slot: None,
            cgroup: false,
            disk: false,
            supervisor: None,
            may_be_supervised: false,
        }
    }

    /// True if something is left that a VM used.
    pub(super) const fn are_left(&self) -> bool {
        self.supervisor.is_some()
            || self.may_be_supervised
            || self.cgroup
            || self.disk
            || self.slot.is_some()
    }

    /// Records that the VM runs.
    pub(super) fn note_started(&self) {
        if let Some(memory) = &self.memory {
            memory.note_started();
        }
    }

    /// Ends the VM and frees everything except the directory. Every step runs that does not depend
    /// on a failed one. The first failure is returned.
    ///
    /// As long as a process of the VM exists, its slot stays claimed: with the slot, another
    /// sandbox would get the process's user ID and its network. Its memory stays reserved, too.
    pub(super) async fn free(&mut self, host: &HostContext) -> Result<(), DestroyError> {
        let mut first = Ok(());
        let mut note = |result: Result<(), DestroyError>| {
            let done = result.is_ok();
            if let Err(error) = result {
                tracing::warn!(
                    error = error.to_report_string(),
                    "failed to free a resource"
                );
                if first.is_ok() {
                    first = Err(error);
                }
            }
            done
        };
        let mut is_ended = note(self.find_supervisor().await);
        if let Some(supervisor) = &self.supervisor {
            let stopped = supervisor.stop(host.deadlines.stop).await;
            is_ended &= note(stopped.map_err(Into::into));
            if is_ended {
                self.supervisor = None;
                failpoint::hit("agent.free.stopped", None);
            }
        }
        // The VM's processes must go before the resources that they use. A network in use would
        // survive without a name.
        if note(self.kill_processes(host).await.map_err(Into::into)) {
            self.cgroup = false;
            failpoint::hit("agent.free.killed", None);
        } else {
            is_ended = false;
        }
        if is_ended {
            self.memory = None;
            let removed = self.remove_export();
            note(removed.map_err(Into::into));
        }
        if self.disk
            && let Some(sandbox_dir) = &self.sandbox_dir
            && note(disk::remove(sandbox_dir).map_err(Into::into))
        {
            self.disk = false;
        }
        if let Some(slot) = self.slot {
            if !is_ended {
                tracing::warn!(%slot, "slot quarantined: the VM's processes still exist");
            } else if note(free_network(host, slot).await) {
                self.slot = None;
            }
        }
        first
    }

    /// Frees everything. The directory is removed last, and only if all other resources are freed,
    /// because the next agent finds the remaining resources by the directory. The logs of a sandbox
    /// that has failed are kept.
    pub(super) async fn free_all(
        &mut self,
        host: &HostContext,
        has_failed: bool,
    ) -> Result<(), DestroyError> {
        self.free(host).await?;
        failpoint::hit("agent.destroy.freed", None);
        if let Some(sandbox_dir) = &self.sandbox_dir {
            if has_failed {
                SandboxLogs::of(&host.config.data_dir).keep(sandbox_dir, &self.id);
            }
            sandbox_dir.remove()?;
            self.sandbox_dir = None;
            failpoint::hit("agent.destroy.removed", None);
        }
        Ok(())
    }

    /// Connects to a supervisor that may be running.
    async fn find_supervisor(&mut self) -> Result<(), DestroyError> {
        if let Some(sandbox_dir) = self.sandbox_dir.as_ref().filter(|_| self.may_be_supervised) {
            match Supervisor::attach(sandbox_dir.path()).await {
                Ok(supervisor) => self.supervisor = Some(supervisor.into()),
                Err(error) if is_no_supervisor(&error) => {}
                Err(error) => return Err(SupervisorError::unreachable(error).into()),
            }
        }
        self.may_be_supervised = false;
        Ok(())
    }

    /// Removes the mount that a supervisor left behind if it was killed.
    fn remove_export(&self) -> Result<(), DiskError> {
        let Some(sandbox_dir) = &self.sandbox_dir else {
            return Ok(());
        };
        wrenn_disk::export::remove(&sandbox_dir.path().join(files::EXPORT))
    }

    async fn kill_processes(&self, host: &HostContext) -> Result<(), CgroupError> {
        if self.cgroup {
            host.cgroups.remove(&self.id).await?;
        }
        if host.cgroups.are_missing()
            && let Some(slot) = self.slot
        {
            kill_processes_of(slot).await?;
        }
        Ok(())
    }
}

/// Removes a network, then releases its slot. Until then, the slot identifies the owner of the
/// network.
pub(super) async fn free_network(host: &HostContext, slot: Slot) -> Result<(), DestroyError> {
    host.network.remove(slot).await?;
    host.slots.release(slot).map_err(DestroyError::Slot)
}
