//! Tests of the library in a program that maps memory as QEMU does, and in QEMU itself.

mod program;
mod qemu;
mod support;
