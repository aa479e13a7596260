//! QEMU: the driver that works everywhere, with KVM where there is hardware virtualization and in software (TCG) where
//! there is none.

mod api;
mod command_line;
mod control;
mod process;

pub use process::{Qemu, QemuMachine};
