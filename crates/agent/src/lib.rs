//! The host agent: one a machine. It makes, watches and destroys the sandboxes of its host, and serves `hostagent.v1`
//! ([`wrenn_proto::rpc::hostagent`]) to a control plane.
//!
//! Owns, of each sandbox: its folder, disk, network and cgroups. Its machine is its supervisor's, a process that outlives
//! the agent: when an agent ends, in order or not, sandboxes run on, and the next one adopts them.
//!
//! Never decides how long a sandbox lives, and never keeps what only users know: that is the control plane's.
//!
//! What can fail, and who then frees what: see the table in `sandbox.rs` for a create, in `sandbox/adopt.rs` for a restart.
#![forbid(unsafe_code)]

mod cgroup;
mod disk;
mod envd_client;
mod folder;
mod host;
mod network;
mod registry;
mod rpc;
mod sandbox;
mod server;
mod snapshots;
mod supervisor;
mod templates;
pub mod warm;

pub use server::{AgentConfig, AgentError, Deadlines, serve, serve_with};
pub use templates::{Template, TemplateError, TemplateSource};

#[cfg(test)]
#[path = "../tests/support/private_host.rs"]
mod private_host;
