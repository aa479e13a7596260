//! Virtual hardware of a VM, and the VMM that provides it.

use wrenn_model::CpuModel;
use wrenn_proto::{
    machine::MachineProfile,
    supervise::{Accel, FirecrackerSpec},
};

use super::resources::HostContext;
use crate::snapshots::LocatedSnapshot;

/// Part of a supervisor's specification that depends on the VMM.
pub(super) struct Hardware {
    pub(super) accel: Accel,
    pub(super) cpu: CpuModel,
    pub(super) machine: MachineProfile,
    pub(super) kernel_args: String,
    pub(super) firecracker: Option<FirecrackerSpec>,
}

impl Hardware {
    /// Chooses the hardware of a VM. A VM that is restored gets that of its snapshot: the saved
    /// state requires the VMM, the machine and the CPU model. A VM that boots gets what the current
    /// settings of this host say.
    pub(super) fn choose(
        host: &HostContext,
        snapshot: Option<&LocatedSnapshot>,
        exporter_uid: u32,
    ) -> Self {
        let config = &host.config;
        let (cpu, machine) = match snapshot {
            Some(snapshot) => (snapshot.manifest().requires.cpu.clone(), snapshot.machine()),
            None => (
                config.cpu.clone(),
                MachineProfile::current(config.vmm.boots),
            ),
        };
        // A snapshot with unknown hardware was rejected when it was located.
        let kind = machine.kind().unwrap_or(config.vmm.boots);
        Self {
            accel: config.vmm.accel_of(kind),
            cpu,
            machine,
            kernel_args: config.vmm.kernel_args(kind, host.tsc_khz),
            firecracker: config.vmm.firecracker_spec(kind, exporter_uid),
        }
    }
}
