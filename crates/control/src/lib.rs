//! The control plane: what users talk to.
//!
//! Owns the REST API, the API keys, the rows of sandboxes and templates, and the decision what becomes of a sandbox.
//! Never touches a machine itself: everything on a host is asked of its agent over `hostagent.v1`, and the agent's word
//! is checked against the rows every second (`reconciler`). One host is known today, `default`.
//!
//! - [`serve`] runs it until it is told to stop.
//! - `api`: one file a resource; `api/error.rs` is the one place where failures become HTTP.
//! - `e2b`: the same resources for clients of the E2B API.
//! - `state_machine`: which status may follow which, and what must be freed then; no I/O.
//! - `lifecycle`: carries a sandbox through those states; every task here outlives the request that began it.
//! - `traffic`: what the proxy for sandboxes' ports (`wrenn-proxy`) asks.
//! - `reconciler`: brings rows and host together after crashes, restarts and losses; reaps the idle.
//! - `db`: SQL, the same text for SQLite and PostgreSQL.
//!
//! What fails: a broken database is 500 `db_error`, a silent host 503 `unavailable`; nothing is kept in memory that a
//! restart would lose, except what runs at that moment, which the reconciler then settles.
#![forbid(unsafe_code)]

mod agent_client;
mod api;
mod auth;
mod clock;
mod config;
mod db;
mod e2b;
mod error;
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
