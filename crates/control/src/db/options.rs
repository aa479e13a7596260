//! What is rarely asked for, in one column: JSON, to which fields may be added.

use rand::RngExt as _;
use serde::{Deserialize, Serialize};

/// Options of a sandbox that most do without.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Options {
    /// Seconds from a start or a resume to `expires_at`; 0 where it has no such deadline.
    pub(crate) lifetime_sec: u32,
    /// Clients of its guest agent need no token: the traffic listener shows it for them.
    pub(crate) open: bool,
    /// What a client must show to reach its ports, but for the guest agent's; empty: nothing.
    pub(crate) traffic_token: String,
    /// What its servers see as the `Host` of requests; `${PORT}` stands for the port. Empty: what the client sent.
    pub(crate) mask_host: String,
    /// Being paused at its deadline keeps the disk only.
    pub(crate) disk_only: bool,
    /// It is paused, and memory does not count: it boots when it is resumed.
    pub(crate) paused_disk_only: bool,
    /// What is asked of the resume that is under way; none while there is none. Written before the host is asked, so that
    /// whoever learns how it went knows it too.
    pub(crate) resuming: Option<ResumeAs>,
    /// Whether it may reach the world, if its client said so; else `egress` was the service's choice.
    pub(crate) internet: Option<bool>,
    /// Exceptions from `egress`.
    pub(crate) network: NetworkLists,
    /// SHA-256 of the request that made it, if that had an idempotency key; hexadecimal.
    pub(crate) request_hash: String,
}

impl Options {
    /// A token of 160 random bits.
    pub(crate) fn new_traffic_token() -> String {
        hex::encode(rand::rng().random::<[u8; 20]>())
    }
}

/// How to resume.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ResumeAs {
    /// Boot from the disk, whatever memory was saved.
    pub(crate) disk_only: bool,
    /// Seconds from then to its deadline, if not those that it was created with.
    pub(crate) lifetime_sec: Option<u32>,
}

/// Addresses and blocks that may, or may not, be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct NetworkLists {
    /// Wins over `deny`.
    pub(crate) allow: Vec<String>,
    pub(crate) deny: Vec<String>,
}

impl From<&NetworkLists> for wrenn_proto::rpc::hostagent::v1::NetworkPolicy {
    fn from(lists: &NetworkLists) -> Self {
        Self {
            allow: lists.allow.clone(),
            deny: lists.deny.clone(),
            ..Default::default()
        }
    }
}
