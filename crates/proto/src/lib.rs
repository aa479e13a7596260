//! Names, limits and wire types that every part of Wrenn shares; no behaviour beyond checking them.
//!
//! - [`rpc`]: messages, services and clients generated from `proto/*.proto` (Connect).
//! - [`SandboxId`], [`TemplateName`]: identifiers that were checked where they came in, so that a path or a
//!   name of a kernel object can be made of them without another thought.
//! - [`Grant`]: signed links to files.
//! - [`limits`]: sizes and ranges, with their units.
//! - [`supervise`]: what an agent and the supervisor of a sandbox tell each other on one machine.
//! - [`rest`] (feature `rest`): the JSON of the public API, with its OpenAPI schemas.

mod grant;
mod ids;
pub mod limits;
pub mod supervise;

#[cfg(feature = "rest")]
pub mod rest;

pub use grant::Grant;
pub use ids::{InvalidId, SandboxId, TemplateName};

/// Generated code: `rpc::process`, `rpc::filesystem`, `rpc::hostagent::v1`.
#[allow(
    missing_docs,
    unreachable_pub,
    rust_2018_idioms,
    clippy::all,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::unwrap_used,
    reason = "generated; the .proto files carry the documentation"
)]
pub mod rpc {
    connectrpc::include_generated!();
}
