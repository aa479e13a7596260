//! QEMU driver. Works on every host: with KVM if there is hardware virtualization, otherwise with
//! software emulation (TCG).

mod command_line;
mod control;
mod cpu;
mod events;
mod process;

pub use cpu::{CpuError, check_cpu, default_cpu};
pub use process::{Qemu, QemuMachine};
