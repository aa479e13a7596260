//! From a specification to a running machine.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use wrenn_proto::{
    limits,
    supervise::{RestoreSpec, SupervisorSpec, files},
};
use wrenn_snapshot::layout;
use wrenn_sys::fault;
use wrenn_vmm::{ControlError, Machine, MachineConfig, MachineExit, MachineFds, Start, VmmDriver};

use crate::{
    SupervisorError, gateway,
    memory::{Failure, VmmEnd},
};

/// How long a VMM that hung up may take to be gone.
const EXIT_DEADLINE: Duration = Duration::from_secs(2);

/// Opens the guest's TAP device and starts the machine; a restored one stands still until its memory is served.
pub(crate) async fn launch<D: VmmDriver>(
    driver: &D,
    spec: &SupervisorSpec,
    dir: &Path,
    memory: VmmEnd,
) -> Result<D::Machine, SupervisorError> {
    let tap = gateway::open_tap(&spec.network.netns)?;
    let config = MachineConfig {
        name: spec.id.to_string(),
        accel: spec.accel,
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        kernel: spec.kernel.clone(),
        initrd: spec.initrd.clone(),
        kernel_args: kernel_args(spec),
        disk: dir.join(files::DISK),
        disk_layers: spec.disk_layers.clone(),
        base_disk: spec.base_disk.clone(),
        guest_mac: limits::GUEST_MAC.to_owned(),
        netns: spec.network.netns.clone(),
        cgroups: spec.cgroups.clone(),
        uid: spec.uid,
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

/// Puts the machine where the frozen one stood, and lets it go on.
pub(crate) async fn restore<M: Machine>(
    machine: &mut M,
    restore: &RestoreSpec,
    failure: &Failure,
) -> Result<(), SupervisorError> {
    let path = restore.snapshot.join(layout::DEVICE);
    let file = fs::File::open(&path).map_err(|source| SupervisorError::ReadSpec {
        path: path.clone(),
        source,
    })?;
    tokio::select! {
        // Without its memory it would wait for nothing.
        biased;
        reason = failure.occurred() => return Err(SupervisorError::Pages(reason)),
        loaded = machine.load(file.into()) => if let Err(source) = loaded {
            return Err(not_loaded(machine, path, source).await);
        },
    }
    fault::point("supervisor.restore.loaded", Some(machine.pid()));
    Ok(machine.thaw().await?)
}

/// Why a machine was not put where the frozen one stood. A VMM that does not understand the state ends by itself; one that was
/// killed, or is slow, says nothing of the state.
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

/// The image's command line, and what of this sandbox the guest must know before it has a network.
fn kernel_args(spec: &SupervisorSpec) -> String {
    let mut args = spec.kernel_args.clone();
    if !spec.dns.is_empty() {
        let servers: Vec<_> = spec.dns.iter().map(ToString::to_string).collect();
        args.push_str(" wrenn.dns=");
        args.push_str(&servers.join(","));
    }
    args
}
