//! Identifiers, limits and wire types shared by all parts of Wrenn. Contains no behavior except
//! validation.
//!
//! - [`rpc`]: messages, services and clients generated from `proto/*.proto` (Connect).
//! - [`SandboxId`], [`TemplateName`]: identifiers that are validated when they are parsed, so that
//!   they are safe in paths and in names of kernel objects.
//! - [`Grant`]: signed links to files.
//! - [`limits`]: sizes and ranges, with their units.
//! - [`supervise`]: local protocol between the host agent and the supervisor of a sandbox.
//! - [`rest`] (feature `rest`): JSON types of the public API, with their OpenAPI schemas.

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
