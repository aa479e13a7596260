//! Process that runs one sandbox. Owns the VMM, the guest's memory, the console log and the
//! services at the guest's gateway.
//!
//! A supervisor is to a sandbox what a shim is to a container. The host agent starts it with
//! `wrenn supervise --dir DIR`. The agent may exit and restart; the supervisor keeps running, and
//! so does the sandbox. The module [`wrenn_proto::supervise`] defines the protocol between them.
//!
//! A supervisor never changes resources of the agent: the network namespace, the cgroups, and the
//! sandbox's directory except `status.json` and its logs. It frees no resources of the host.
//! When it exits, the kernel frees everything that it held.
//!
//! ```text
//!           spec.json            launched              Stop, SIGTERM
//!   start ───────────► launching ────────► running ─────────────────► stopping
//!                          │                  │                          │
//!                          │ failed           │ VMM exited               │
//!                          ▼                  ▼                          ▼
//!                     status.json,       status.json,               status.json,
//!                     exit 1             exit 1                     exit 0
//! ```
//!
//! | failure                      | state afterwards, and who cleans up                           |
//! |------------------------------|---------------------------------------------------------------|
//! | `spec.json`, socket or TAP   | only `status.json` with the reason; the agent reads it and    |
//! |                              | cleans up                                                     |
//! | the VMM does not start       | the same; the reason contains the VMM's last output           |
//! | the VMM exits, or the        | the same, within milliseconds                                 |
//! | exporter of its disk         |                                                               |
//! | the supervisor is killed     | the kernel kills the VMM and the exporter (parent-death       |
//! |                              | signal); the agent detects this, because there is no          |
//! |                              | `status.json`, and removes the exporter's mount               |
//! | the agent is killed          | unchanged; the next agent connects to the socket              |
#![forbid(unsafe_code)]

pub mod console;
mod control;
mod disk;
mod disk_room;
mod error;
pub mod gateway;
mod log;
mod machine;
mod machine_actor;
mod memory;
mod preload;
mod status;
mod supervise;
mod vmm_time;

pub use error::SupervisorError;
pub use log::SupervisorLog;
pub use preload::find as paging_library;
pub use supervise::{run, run_with};
