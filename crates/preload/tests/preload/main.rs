//! The library in a program that maps memory as QEMU does, and in QEMU.

mod program;
mod qemu;
mod support;
