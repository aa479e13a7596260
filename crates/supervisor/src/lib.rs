//! One process a sandbox: it owns the VMM, the guest's memory, its console log and the services of its gateway.
//!
//! A supervisor is to a sandbox what a shim is to a container. The host agent starts it (`wrenn supervise --dir DIR`)
//! and may die and come back; the supervisor goes on, and with it the sandbox. What the agent asks of it, and where, is
//! in [`wrenn_proto::supervise`].
//!
//! It never touches what the agent owns: the network namespace, cgroups, the sandbox's folder (but for `status.json` and
//! `console.log`). It frees nothing of the host; it ends, and the kernel frees what it held.
//!
//! ```text
//!             spec.json            launched              Stop, SIGTERM
//!   start ──────────────► launching ────────► running ─────────────────► stopping ──► status.json, exit 0
//!                             │                  │ VMM ended by itself
//!                             │ failed           └──────────────────────────────────► status.json, exit 1
//!                             └─────────────────────────────────────────────────────► status.json, exit 1
//! ```
//!
//! | what fails                     | what is left, and who frees it                                                |
//! |--------------------------------|--------------------------------------------------------------------------------|
//! | `spec.json`, socket, TAP       | nothing but `status.json` with the reason; the agent reads it and cleans up     |
//! | the VMM does not start         | the same; the VMM's last words are part of the reason                           |
//! | the VMM ends                   | the same; within milliseconds                                                   |
//! | the supervisor is killed       | the kernel kills the VMM (parent-death signal); no `status.json`: the agent knows |
//! | the agent is killed            | nothing happens here; the next agent connects to the socket                     |
#![forbid(unsafe_code)]

mod console;
mod control;
mod error;
mod gateway;
mod machine;
mod memory;
pub mod mmds;
pub mod ntp;
mod owner;
mod preload;
mod status;
mod supervise;

pub use error::SupervisorError;
pub use preload::find as paging_library;
pub use supervise::{run, run_with};
