//! Virtual machine monitors behind one trait: [`VmmDriver`] starts a machine, [`Machine`] is one that runs.
//!
//! A driver owns the VMM's process and its control socket. It never touches networks, cgroups or disks: it is handed
//! open descriptors and paths ([`MachineConfig`], [`MachineFds`]), and starts the VMM inside a [`jail`], so that the
//! VMM sees the files of its own sandbox and nothing else of the host.
//!
//! When a machine value is dropped its process is killed; when the process that holds it dies, the kernel kills the
//! VMM (parent-death signal). A VMM therefore never outlives the one that serves its memory.
#![forbid(unsafe_code)]

mod driver;
pub mod fake;
pub mod jail;
pub mod qemu;

pub use driver::{
    ControlError, LaunchError, Machine, MachineConfig, MachineExit, MachineFds, Start, StopError,
    VmmDriver,
};
