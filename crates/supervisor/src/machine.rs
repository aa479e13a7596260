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
        work_dir: dir.to_owned(),
        // The service at the gateway serves it, for every VMM.
        metadata: None,
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::os::unix::net::UnixStream;

    use wrenn_model::MachineSize;
    use wrenn_proto::{
        machine::MachineProfile,
        supervise::{Accel, DiskRate},
    };
    use wrenn_vmm::fake::{FakeDriver, FakeMachine};

    use super::*;

    /// Starts a stand-in for a VMM that reports a version.
    async fn stand_in(version: &str) -> FakeMachine {
        let driver = FakeDriver {
            script: "exec sleep 1000".to_owned(),
            version: version.to_owned(),
        };
        let config = MachineConfig {
            name: "test".to_owned(),
            accel: Accel::Tcg,
            cpu: "max".parse().unwrap(),
            machine: MachineProfile::current(),
            size: MachineSize {
                vcpus: 1,
                memory_mib: 128,
                disk_mib: 1024,
            },
            kernel: PathBuf::new(),
            initrd: PathBuf::new(),
            kernel_args: String::new(),
            disk: PathBuf::new(),
            disk_layers: Vec::new(),
            base_disk: PathBuf::new(),
            guest_mac: guest::MAC.to_owned(),
            netns: PathBuf::new(),
            cgroups: Vec::new(),
            uid: 70_001,
            disk_rate: DiskRate::default(),
            start: Start::Restore,
        };
        let open = || fs::File::open("/dev/null").unwrap().into();
        // The layout that the stand-in sends stays in the socket.
        let (_ours, pager) = UnixStream::pair().unwrap();
        let fds = MachineFds {
            memory: open(),
            pager: pager.into(),
            userfaultfd: None,
            tap: open(),
        };
        driver.launch(config, fds).await.unwrap()
    }

    #[tokio::test]
    async fn vmm_that_was_replaced_by_another_series_loads_no_state() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(layout::DEVICE), "a stand-in's state").unwrap();
        let saved = |vmm: &str| RestoreSpec {
            build: "0".repeat(32),
            snapshot: dir.path().to_owned(),
            memory: Vec::new(),
            vmm: vmm.to_owned(),
            prefetch: false,
            remote: None,
        };
        let never = Failure::never();
        for (here, made, expected) in [
            ("qemu 7.2.22", "qemu 7.2.4", true),
            ("qemu 7.2.22", "", true),
            ("", "qemu 7.2.4", true),
            ("qemu 8.2.1", "qemu 7.2.4", false),
        ] {
            let mut machine = stand_in(here).await;
            let restored = restore(&mut machine, &saved(made), &never).await;
            match restored {
                Ok(()) => assert!(expected, "{made} on {here}"),
                Err(SupervisorError::OtherVmm { .. }) => assert!(!expected, "{made} on {here}"),
                Err(error) => panic!("{made} on {here}: {error}"),
            }
        }
    }
}
