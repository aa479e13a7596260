//! Control plane: the component that users interact with.
//!
//! Owns the REST API, the API keys, the rows of sandboxes and templates, and all decisions about
//! the life of a sandbox. Never touches a VM itself: it sends every request for a host to the
//! host's agent over `hostagent.v1`, calls guest agents through the agent's tunnels, and compares the agent's reports with the rows every second
//! (`reconciler`). There is currently one host, `default`.
//!
//! - [`serve`] runs the control plane until shutdown.
//! - `api`: one file per resource; `api/error.rs` is the only place where failures become HTTP
//!   responses.
//! - `e2b`: the same resources for clients of the E2B API.
//! - `state_machine`: valid status transitions, and the clean-up that each requires; no I/O.
//! - `lifecycle`: carries sandboxes through those states; every task in it outlives the request
//!   that started it.
//! - `guest`: calls to the guest agents of sandboxes: processes, files, terminals.
//! - `traffic`: queries of the proxy for the ports of sandboxes (`wrenn-proxy`).
//! - `reconciler`: reconciles rows and host after crashes, restarts and losses; reaps idle
//!   sandboxes.
//! - `db`: SQL, the same text for SQLite and PostgreSQL.
//!
//! Failures: a database failure is 500 `db_error`, a host that does not answer is 503
//! `unavailable`. A restart interrupts only the operations in progress, which the reconciler then
//! settles.
#![forbid(unsafe_code)]

mod agent_client;
mod api;
mod auth;
mod clock;
mod config;
mod db;
mod e2b;
mod error;
mod guest;
mod host;
mod lifecycle;
mod reconciler;
mod samples;
mod server;
mod state_machine;
mod traffic;

pub use api::openapi::openapi;
pub use config::ControlConfig;
pub use error::ControlError;
pub use server::{Listening, serve};
