//! Control plane: all decisions about the life of sandboxes. No HTTP types; `wrenn-api` serves it.
//!
//! Owns the API keys, the rows of sandboxes and templates (`wrenn-db`), and the calls to host
//! agents. Never touches a VM itself: it sends every request for a host to the host's agent over
//! `hostagent.v1`, and compares the agent's reports with the rows every second ([`reconciler`]).
//!
//! - [`state_machine`]: valid status transitions, and the clean-up that each requires; no I/O.
//! - [`lifecycle`]: carries sandboxes through those states; every task in it outlives the request
//!   that started it.
//! - [`reconciler`]: reconciles rows and host after crashes, restarts and losses; reaps idle
//!   sandboxes.
//! - [`api_key`]: generates and checks API keys. [`principal`]: the caller that a key identifies.
//! - [`guest`]: calls to the guest agents of sandboxes, through the agent's tunnels.
//! - [`fleet`]: the hosts, addressed by their ids. [`host`]: one host as last observed.
//! - [`samples`]: resource usage over time.
//! - [`unaddressed`]: finds the sandbox of a request to a port that names no sandbox.
//!
//! A restart interrupts only the operations in progress, which the reconciler then settles.
#![forbid(unsafe_code)]

pub mod agent_client;
pub mod api_key;
pub mod clock;
mod config;
mod error;
pub mod fleet;
pub mod guest;
pub mod host;
pub mod lifecycle;
pub mod principal;
pub mod reconciler;
pub mod samples;
pub mod state_machine;
pub mod unaddressed;

pub use config::{ControlConfig, Limits};
pub use error::ControlError;
