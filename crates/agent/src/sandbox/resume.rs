//! Resume: which part of the last snapshot a VM continues from, and the specification of that VM.
//!
//! The later steps of a resume are the same as for a create (`boot.rs`).

use wrenn_proto::supervise::SupervisorSpec;

use super::{Running, boot::Boot, error::CreateError, hardware::Hardware};
use crate::snapshots::SnapshotRef;

/// Part of the last snapshot that a resume uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResumeFrom {
    /// The whole snapshot: the VM continues where it was paused.
    Memory,
    /// The disk only: the VM boots, as after a power failure.
    Disk,
}

impl Boot<'_> {
    /// Resumes the sandbox from `last`, its last snapshot.
    pub(super) async fn resume(
        &mut self,
        last: &SnapshotRef,
        from: ResumeFrom,
    ) -> Result<Running, CreateError> {
        let sandbox_dir = self.resources.sandbox_dir.clone();
        let sandbox_dir = sandbox_dir.ok_or(CreateError::Panicked)?;
        let snapshots = &self.host.snapshots;
        let snapshot = match from {
            ResumeFrom::Memory => Some(snapshots.locate(last)?),
            ResumeFrom::Disk => None,
        };
        // Not the paths of the former specification: the directories may have been moved since.
        let disk = snapshots.disk(last)?;
        let old = sandbox_dir.read_spec().map_err(CreateError::SandboxDir)?;
        let access = self.sandbox.access();
        let parts = self.make_environment(&access, old.size).await?;
        let prefetch = self.host.config.prefetch;
        let nameservers = self.host.network.nameservers(&access);
        let hardware = Hardware::choose(self.host, snapshot.as_ref(), parts.exporter_uid);
        let spec = SupervisorSpec {
            uid: parts.uid,
            cgroups: parts.cgroups,
            supervisor_cgroups: parts.supervisor_cgroups,
            disk_rate: self.host.disk_rate(),
            network: parts.network,
            kernel: disk.kernel,
            initrd: disk.initrd,
            base_disk: disk.base,
            disk_layers: disk.layers,
            restore: snapshot.as_ref().map(|m| m.restore(prefetch)),
            accel: hardware.accel,
            cpu_model: Some(hardware.cpu),
            machine: Some(hardware.machine),
            kernel_args: hardware.kernel_args,
            firecracker: hardware.firecracker,
            dns: nameservers.guest,
            dns_upstreams: nameservers.upstreams,
            disk_room_bytes: self.host.disk_space.room_bytes(),
            ..old
        };
        sandbox_dir
            .forget_final_status()
            .map_err(CreateError::SandboxDir)?;
        self.start(&sandbox_dir, &spec, snapshot.as_ref()).await
    }
}
