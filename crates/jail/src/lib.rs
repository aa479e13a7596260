//! Jail of a process that handles data of a guest: a VMM, or a tool that reads disk layers that a
//! VMM wrote. Restricts what the process can see and do.
//!
//! `wrenn jail --spec FILE` enters the jail step by step ([`enter`]) and then becomes the program
//! (exec). From then on the process
//! - runs as a user and group that belong to this sandbox only, without capabilities and without a
//!   way to gain any;
//! - is in the sandbox's cgroups and network namespace, in IPC, UTS, cgroup and mount namespaces of
//!   its own, and the first process of a PID namespace ([`spawn_in_pid_namespace`]);
//! - sees a root file system made of the program, the directories of its libraries and data
//!   (read-only, no devices, no setuid), a `/proc` with processes only, devices, and its own files
//!   at constant paths below [`HOME`]; a program that binds sockets itself also has a small
//!   directory for them ([`SocketDir`]);
//! - has resource limits ([`ProcessLimits`]), and can make only the system calls in [`seccomp`];
//! - is killed when the thread that started it ends.
//!
//! The process has no user namespace of its own: the user ID belongs to this process alone and has
//! no capabilities. In a user namespace it would have some, and reach more code of the kernel.
//!
//! The paths below [`HOME`] are the same for every sandbox, because a VMM's snapshot may store
//! them.
//!
//! Nothing needs to be undone: mounts belong to the mount namespace and disappear with the process.
//! On failure, the process prints the error and exits with status 1. The supervisor reads the text
//! from the program's standard error.
#![forbid(unsafe_code)]

mod error;
mod parent;
mod process;
mod root;
pub mod seccomp;
mod sockets;
mod spec;

use std::{convert::Infallible, fs, io, path::Path};

pub use error::JailError;
pub use parent::{Alive, ParentPipe, spawn_in_pid_namespace};
pub use sockets::{FoundSocket, SocketDir};
pub use spec::{JailFile, JailSpec, Parent, ProcessLimits, Program};

use error::failed;
use parent::Watch;
use seccomp::Permissions;

/// Directory of the VMM's own files, in the jail.
pub const HOME: &str = "/tmp/fc-vm";
/// Path of the guest's kernel, in the jail.
pub const KERNEL: &str = "/tmp/fc-vm/vmlinux";
/// Path of the guest's initial RAM disk, in the jail.
pub const INITRD: &str = "/tmp/fc-vm/initrd.img";
/// Path of the guest's disk, in the jail.
pub const DISK: &str = "/tmp/fc-vm/rootfs.qcow2";
/// Directory of the read-only disk layers, in the jail. `0` is the lowest layer.
pub const DISK_LAYERS: &str = "/tmp/fc-vm/layers";
/// Path of the library that reports the location of guest memory, in the jail.
pub const PRELOAD: &str = "/tmp/fc-vm/preload.so";
/// Path at which the VMM opens guest memory. No file exists there; the library handles the call.
pub const MEMORY: &str = "/tmp/fc-vm/memory";
/// Path of the disk's base image, in the jail.
pub const BASE_DISK: &str = "/tmp/fc-vm/base";
/// Path of the guest's disk in the jail of a VMM that takes a raw disk. The path is stored in the
/// VMM's snapshots.
pub const RAW_DISK: &str = "/tmp/fc-vm/rootfs.ext4";
/// Directory of the sockets that the parent binds, in a jail that has a [`SocketDir`].
pub const SOCKETS: &str = "/tmp/fc-vm/sockets";
/// Directory of the sockets that the jailed process binds.
pub const OWN_SOCKETS: &str = "/tmp/fc-vm/sockets/own";

/// Device of the kernel's hypervisor.
const KVM: &str = "/dev/kvm";
/// Device that attaches to TAP devices.
const TUN: &str = "/dev/net/tun";

/// Enters the jail described by `spec_path` and executes its program. Returns only if a step
/// failed.
#[must_use]
pub fn enter(spec_path: &Path) -> JailError {
    match enter_steps(spec_path) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn enter_steps(spec_path: &Path) -> Result<Infallible, JailError> {
    let text = fs::read(spec_path).map_err(failed("read the specification"))?;
    let spec: JailSpec = serde_json::from_slice(&text)
        .map_err(io::Error::from)
        .map_err(failed("parse the specification"))?;
    let watch = Watch::new(spec.parent)?;
    process::die_with_parent(&watch)?;
    process::be_killed_first()?;
    process::join_cgroups(&spec.cgroups)?;
    process::enter_namespaces(spec.netns.as_deref())?;
    root::build_root(&spec)?;
    process::limit(&spec.limits)?;
    process::drop_privileges(spec.uid)?;
    // Changing the user ID clears the parent-death signal.
    process::die_with_parent(&watch)?;
    drop(watch);
    if let Some(fds) = &spec.fds {
        wrenn_sys::session::inherit_only(fds).map_err(failed("close other descriptors"))?;
    }
    if spec.seccomp {
        // Last, because the steps before need calls that the program does not.
        let has_device = |name| spec.devices.iter().any(|path| path == Path::new(name));
        seccomp::apply(Permissions {
            kvm: has_device(KVM),
            tap: has_device(TUN),
            sockets: spec.sockets.is_some(),
        })?;
    }
    process::execute(&spec.argv, &spec.env)
}
