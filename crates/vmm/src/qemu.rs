//! QEMU driver. Works on every host: with KVM if there is hardware virtualization, otherwise with
//! software emulation (TCG).

mod command_line;
mod control;
mod events;
mod process;

pub use process::{Qemu, QemuMachine};
