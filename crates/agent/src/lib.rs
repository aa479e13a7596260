//! Host agent: one per host. Creates, watches and destroys the sandboxes of its host, and serves
//! `hostagent.v1` ([`wrenn_proto::rpc::hostagent`]) to a control plane.
//!
//! Owns the directory, disk, network and cgroups of each sandbox. The VM belongs to the sandbox's
//! supervisor, a process that outlives the agent. When an agent exits, orderly or not, its
//! sandboxes keep running, and the next agent adopts them.
//!
//! Never decides the lifetime of a sandbox, and never stores data that only users know. Both belong
//! to the control plane.
//!
//! Failures and the responsibility for cleaning up are listed in the tables in `sandbox.rs`
//! (create) and `sandbox/adopt.rs` (restart).
#![forbid(unsafe_code)]

mod admission;
mod cgroup;
mod disk;
mod disk_space;
mod host;
mod inventory;
mod limits;
mod memory_ledger;
mod network;
mod registry;
mod rpc;
mod sandbox;
mod sandbox_dir;
mod sandbox_logs;
mod server;
mod snapshots;
mod supervisor;
pub mod template_snapshot;
mod templates;
mod vmms;

pub use cgroup::{policy::requires_limits, unusable_cgroups};
pub use limits::{CgroupPolicy, HostLimits, SandboxLimits};
pub use network::{
    addresses::{Subnets, SubnetsError},
    ceiling::EgressCeiling,
    examine::{NetworkReport, examine},
    firewall::Obstacle,
};
pub use sandbox::BootPolicy;
pub use server::{AgentConfig, AgentError, Deadlines, serve, serve_with};
pub use snapshots::{ObjectStoreConfig, check_object_store};
pub use templates::{Template, TemplateError, TemplateSource};
pub use vmms::VmmConfig;

#[cfg(test)]
use wrenn_test_host as private_host;
