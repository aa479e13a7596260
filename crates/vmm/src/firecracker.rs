//! Firecracker driver. Works on hosts with hardware virtualization that have a statically linked
//! `firecracker`, version 1.10 or newer.
//!
//! Owns the process in its jail and its API socket. The table shows what differs from QEMU; the
//! decision record `docs/decisions/0040` has the reasons, and the steps with their failures.
//!
//! | subject          | QEMU                           | Firecracker                            |
//! |------------------|--------------------------------|----------------------------------------|
//! | control          | inherited socket               | socket that Firecracker binds          |
//! | network          | inherited TAP descriptor       | name of the TAP device                 |
//! | disk             | chain of qcow2 files           | one raw file                           |
//! | changed memory   | page tables of the process     | file that Firecracker writes           |
//! | handshake        | at the launch                  | while a snapshot is loaded             |
//! | full disk        | guest is paused, write retried | guest gets an I/O error                |
//! | CPU model        | as configured                  | that of the host, without a template   |
//!
//! The console is Firecracker's standard output, in a boot and in a restore. Its log and its
//! metrics go to pipes of the supervisor.

pub mod api;
mod client;
mod command_line;
mod control;
mod events;
mod files;
mod handshake;
mod process;
mod program;
mod version;

pub use client::{Client, Deadlines};
pub use control::{Channels, Control, Pages};
pub use files::SnapshotFiles;
pub use process::{Firecracker, FirecrackerMachine, RestoreMemory};
pub use program::{ProgramError, examine};
pub use version::Version;
