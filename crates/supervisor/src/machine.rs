//! From a specification to a running machine.

use std::{io, os::fd::OwnedFd, path::Path};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use wrenn_proto::{
    limits,
    supervise::{SupervisorSpec, files},
};
use wrenn_vmm::{MachineConfig, MachineFds, VmmDriver};

use crate::{SupervisorError, gateway};

/// Makes the guest's memory, opens its TAP device, and starts the machine.
pub(crate) async fn launch<D: VmmDriver>(
    driver: &D,
    spec: &SupervisorSpec,
    dir: &Path,
) -> Result<D::Machine, SupervisorError> {
    let memory =
        guest_memory(spec.memory_mib).map_err(SupervisorError::io("make the guest's memory"))?;
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
        base_disk: spec.base_disk.clone(),
        guest_mac: limits::GUEST_MAC.to_owned(),
        netns: spec.network.netns.clone(),
        cgroups: spec.cgroups.clone(),
        uid: spec.uid,
    };
    Ok(driver.launch(config, MachineFds { memory, tap }).await?)
}

/// Guest memory: a file without a name, so that it can be shared, paged and read without the VMM's help.
fn guest_memory(memory_mib: u32) -> io::Result<OwnedFd> {
    let fd = memfd_create(c"guest-memory", MemfdFlags::CLOEXEC)?;
    ftruncate(&fd, u64::from(memory_mib) * 1024 * 1024)?;
    Ok(fd)
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
