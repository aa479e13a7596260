//! Start of a VM from a specification.

use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::timeout;
use wrenn_proto::{
    guest,
    machine::can_load,
    supervise::{RestoreSpec, SupervisorSpec},
};
use wrenn_snapshot::layout;
use wrenn_sys::failpoint;
use wrenn_vmm::{
    ControlError, Machine, MachineConfig, MachineExit, MachineFds, MemoryAccess, Start, VmmDriver,
};

use crate::{
    SupervisorError, gateway,
    memory::{Failure, GuestMemory, VmmFds},
};

/// Maximum time until a VMM that closed its control connection has exited.
const EXIT_DEADLINE: Duration = Duration::from_secs(2);

/// Opens the guest's TAP device and starts the VM with the disk at a path. A VM that is to be restored stays paused until
/// its memory is served.
pub(crate) async fn launch<D: VmmDriver>(
    driver: &D,
    spec: &SupervisorSpec,
    dir: &Path,
    disk: PathBuf,
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
        disk,
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

/// Restores the saved device state and resumes the VM. `memory` serves its memory afterwards.
/// Returns the notification that it can no longer do so.
pub(crate) async fn restore<M: Machine>(
    machine: &mut M,
    restore: &RestoreSpec,
    memory: &mut GuestMemory,
) -> Result<Failure, SupervisorError> {
    check_version(machine, restore)?;
    let path = restore.snapshot.join(layout::DEVICE);
    let file = fs::File::open(&path).map_err(|source| SupervisorError::ReadSpec {
        path: path.clone(),
        source,
    })?;
    let pid = Some(machine.pid());
    let loaded = match machine.memory_access() {
        MemoryAccess::Files {
            sends_handshake: true,
        } => load_with_handshake(machine, file.into(), memory).await?,
        access => {
            if access == MemoryAccess::PageTables {
                memory.attach()?;
            }
            failpoint::hit("supervisor.restore.attached", pid);
            let failure = memory.failure()?;
            let load = machine.load(file.into());
            served(load, &failure).await?.map(|()| failure)
        }
    };
    let failure = match loaded {
        Ok(failure) => failure,
        Err(source) => return Err(not_loaded(machine, path, source).await),
    };
    failpoint::hit("supervisor.restore.loaded", pid);
    machine.resume().await?;
    Ok(failure)
}

/// Checks that the VMM can load a snapshot. It may have been replaced since the agent chose the
/// snapshot.
fn check_version<M: Machine>(machine: &M, restore: &RestoreSpec) -> Result<(), SupervisorError> {
    let here = machine.version();
    if restore.vmm.is_empty() || here.is_empty() || can_load(&restore.vmm, &here) {
        return Ok(());
    }
    let made = restore.vmm.clone();
    Err(SupervisorError::OtherVmm { made, here })
}

/// Loads the state of a VM that hands over its memory while it loads. Its memory must be served
/// from then on: the load may need it.
async fn load_with_handshake<M: Machine>(
    machine: &mut M,
    file: OwnedFd,
    memory: &mut GuestMemory,
) -> Result<Result<Failure, ControlError>, SupervisorError> {
    let pid = Some(machine.pid());
    let mut attaching = tokio::task::spawn_blocking(memory.attach_later()?);
    let mut load = std::pin::pin!(machine.load(file));
    let mut loaded = None;
    let attached = tokio::select! {
        biased;
        attached = &mut attaching => attached,
        result = &mut load => {
            if let Err(source) = result {
                // The socket of the handshake is closed, so the other thread ends.
                return Ok(Err(source));
            }
            loaded = Some(result);
            attaching.await
        }
    };
    match attached.unwrap_or(Err(SupervisorError::Panicked)) {
        Ok(attached) => memory.attached(attached),
        Err(error) => {
            // If the VMM failed, its reason is the cause. Without served memory, it may also wait
            // for ever.
            let reason = match loaded {
                Some(_) => None,
                None => timeout(EXIT_DEADLINE, load)
                    .await
                    .ok()
                    .and_then(Result::err),
            };
            return reason.map_or(Err(error), |source| Ok(Err(source)));
        }
    }
    failpoint::hit("supervisor.restore.attached", pid);
    let failure = memory.failure()?;
    Ok(match loaded {
        Some(result) => result,
        None => served(load, &failure).await?,
    }
    .map(|()| failure))
}

/// Waits for a load. Without served memory, it would never complete.
async fn served(
    load: impl Future<Output = Result<(), ControlError>>,
    failure: &Failure,
) -> Result<Result<(), ControlError>, SupervisorError> {
    tokio::select! {
        biased;
        reason = failure.occurred() => Err(SupervisorError::Pages(reason)),
        loaded = load => Ok(loaded),
    }
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
        && let Ok(exit @ MachineExit::Killed { .. }) = timeout(EXIT_DEADLINE, machine.wait()).await
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
        machine::{MachineProfile, VmmKind},
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
            machine: MachineProfile::current(VmmKind::Qemu),
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
            work_dir: PathBuf::new(),
            metadata: None,
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
        let saved = |vmm: &str| RestoreSpec {
            build: "0".repeat(32),
            snapshot: PathBuf::new(),
            memory: Vec::new(),
            vmm: vmm.to_owned(),
            prefetch: false,
            remote: None,
        };
        for (here, made, expected) in [
            ("qemu 7.2.22", "qemu 7.2.4", true),
            ("qemu 7.2.22", "", true),
            ("", "qemu 7.2.4", true),
            ("qemu 8.2.1", "qemu 7.2.4", false),
        ] {
            let machine = stand_in(here).await;
            match check_version(&machine, &saved(made)) {
                Ok(()) => assert!(expected, "{made} on {here}"),
                Err(SupervisorError::OtherVmm { .. }) => assert!(!expected, "{made} on {here}"),
                Err(error) => panic!("{made} on {here}: {error}"),
            }
        }
    }
}
