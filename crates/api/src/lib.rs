//! HTTP interfaces of the control plane: the REST API, the E2B API, and the listener for the ports
//! of sandboxes.
//!
//! - [`serve`] runs the control plane until shutdown.
//! - `v1`: the REST API, one file per resource.
//! - `e2b`: the same resources for clients of the E2B API. `v1` and `e2b` do not know each other.
//! - `router`: all routes and the middleware around them; `authorize`: the check of the API key.
//! - `error`: the only place where failures become HTTP responses of the REST API.
//! - `traffic`: queries of the proxy for the ports of sandboxes (`wrenn-proxy`).
//!
//! Decisions about sandboxes are made in `wrenn-control`, which has no HTTP types.
//!
//! Failures: a database failure is 500 `db_error`, a host that does not answer is 503
//! `unavailable`.
#![forbid(unsafe_code)]

mod app;
mod authorize;
mod buffers;
mod e2b;
mod error;
mod extract;
mod openapi;
mod records;
mod router;
mod server;
mod templates;
mod traffic;
mod v1;
mod validate;

pub use openapi::openapi;
pub use server::{Listening, serve};
