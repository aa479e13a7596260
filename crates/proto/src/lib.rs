//! Wire formats between the parts of Wrenn.
//!
//! - [`rpc`]: messages, services and clients generated from `proto/*.proto` (Connect).
//! - [`supervise`]: local protocol between the host agent and the supervisor of a sandbox.
//! - [`machine`]: virtual hardware of VMs, and which versions of the VMM load each other's states.
//! - [`Grant`]: signed links to files.
//! - [`headers`]: names of HTTP headers. [`guest`]: constants that guest and host share. [`ntp`]:
//!   packets.

mod grant;
pub mod guest;
pub mod headers;
pub mod machine;
pub mod ntp;
pub mod supervise;

pub use grant::Grant;

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
