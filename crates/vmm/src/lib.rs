//! Virtual machine monitors (VMMs) behind one trait: [`VmmDriver`] starts a VM, [`Machine`] is a
//! running VM.
//!
//! A driver owns the VMM process and its control socket. It never touches networks, cgroups or
//! disks: it receives open descriptors and paths ([`MachineConfig`], [`MachineFds`]). It starts the
//! VMM inside a jail ([`wrenn_jail`]), so the VMM sees the files of its own sandbox and nothing
//! else of the host.
//!
//! Two VMMs give access to guest memory in two ways ([`MemoryAccess`]). The decision record
//! `docs/decisions/0040` compares them.
//!
//! Dropping a machine value kills its VMM. If the process that holds the value dies, the kernel
//! kills the VMM (parent-death signal). A VMM therefore never outlives the process that serves its
//! memory.
#![forbid(unsafe_code)]

mod driver;
pub mod fake;
pub mod firecracker;
pub mod qemu;
mod vmm_process;

pub use driver::{
    ControlError, DiskForm, LaunchError, Machine, MachineConfig, MachineExit, MachineFds,
    MemoryAccess, SavedMemory, Start, StopError, VmmDriver,
};
