//! Start of a VM from a specification.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use wrenn_proto::{
    guest,
    machine::can_load,
    supervise::{RestoreSpec, SupervisorSpec, files},
};
use wrenn_snapshot::layout;
use wrenn_sys::failpoint;
use wrenn_vmm::{ControlError, Machine, MachineConfig, MachineExit, MachineFds, Start, VmmDriver};

use crate::{
    SupervisorError, gateway,
    memory::{Failure, VmmFds},
};

/// Maximum time until a VMM that closed its control connection has exited.
const EXIT_DEADLINE: Duration = Duration::from_secs(2);

/// Opens the guest's TAP device and starts the VM. A VM that is to be restored stays paused until
/// its memory is served.
pub(crate) async fn launch<D: VmmDriver>(
    driver: &D,
    spec: &SupervisorSpec,
    dir: &Path,
    memory: VmmFds,
) -> Result<D::Machine, SupervisorError> {
    let tap = gateway::open_tap(&spec.network.netns)?;
    let config = MachineConfig {
        name: spec.id.to_string(),
        accel: spec.accel,
        cpu: spec.cpu(),
        machine: spec.profile(),
        size: spec.size,
        kernel: spec.kernel.clone(),
        initrd: spec.initrd.clone(),
        kernel_args: kernel_args(spec),
        disk: dir.join(files::DISK),
        disk_layers: spec.disk_layers.clone(),
        base_disk: spec.base_disk.clone(),
        guest_mac: guest::MAC.to_owned(),
        netns: spec.network.netns.clone(),
        cgroups: spec.cgroups.clone(),
        uid: spec.uid,
        disk_rate: spec.disk_rate,
        start: match spec.restore {
            Some(_) => Start::Restore,
            None => Start::Boot,
        },
    };
    let fds = MachineFds {
        memory: memory.memory,
        pager: memory.pager,
        userfaultfd: memory.userfaultfd,
        tap,
    };
    Ok(driver.launch(config, fds).await?)
}

/// Restores the saved device state and resumes the VM. The version of the VMM is checked again
/// here, because the VMM may have been replaced since the agent chose the snapshot.
pub(crate) async fn restore<M: Machine>(
    machine: &mut M,
    restore: &RestoreSpec,
    failure: &Failure,
) -> Result<(), SupervisorError> {
    let here = machine.version();
    if !restore.vmm.is_empty() && !here.is_empty() && !can_load(&restore.vmm, &here) {
        let made = restore.vmm.clone();
        return Err(SupervisorError::OtherVmm { made, here });
    }
    let path = restore.snapshot.join(layout::DEVICE);
    let file = fs::File::open(&path).map_err(|source| SupervisorError::ReadSpec {
        path: path.clone(),
        source,
    })?;
    tokio::select! {
        // Checked first: without served memory, the load would never complete.
        biased;
        reason = failure.occurred() => return Err(SupervisorError::Pages(reason)),
        loaded = machine.load(file.into()) => if let Err(source) = loaded {
            return Err(not_loaded(machine, path, source).await);
        },
    }
    failpoint::hit("supervisor.restore.loaded", Some(machine.pid()));
    Ok(machine.resume().await?)
}

/// Returns the reason why a VM could not be restored. A VMM that cannot decode the state exits by
/// itself. If the VMM was killed or timed out, the state is not to blame.
async fn not_loaded<M: Machine>(
    machine: &mut M,
    path: PathBuf,
    source: ControlError,
) -> SupervisorError {
    if matches!(source, ControlError::Deadline { .. }) {
        return source.into();
    }
    if matches!(source, ControlError::Io { .. })
        && let Ok(exit @ MachineExit::Killed { .. }) =
            tokio::time::timeout(EXIT_DEADLINE, machine.wait()).await
    {
        return SupervisorError::Ended(exit);
    }
    SupervisorError::DeviceState { path, source }
}

/// Returns the image's kernel command line, extended by the parameters of this sandbox that the
/// guest needs before it has a network.
fn kernel_args(spec: &SupervisorSpec) -> String {
    let mut args = spec.kernel_args.clone();
    if !spec.dns.is_empty() {
        let servers: Vec<_> = spec.dns.iter().map(ToString::to_string).collect();
        args.push_str(" wrenn.dns=");
        args.push_str(&servers.join(","));
    }
    if spec.network.mtu != guest::DEFAULT_MTU {
        args.push_str(&format!(" wrenn.mtu={}", spec.network.mtu));
    }
    args
}
