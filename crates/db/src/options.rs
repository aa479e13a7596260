//! Rarely used options of a sandbox, in one column: a JSON object to which fields may be added.

use serde::{Deserialize, Serialize};

/// Options that most sandboxes do not use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Options {
    /// Seconds from a start or a resume to `expires_at`; 0 if the sandbox has no such deadline.
    pub lifetime_sec: u32,
    /// Clients of the guest agent need no token. The traffic listener adds the token for them.
    pub open: bool,
    /// Token required from clients of the sandbox's ports, except the guest agent's port. Empty:
    /// none.
    pub traffic_token: String,
    /// `Host` header that the sandbox's servers receive; `${PORT}` stands for the port. Empty: the
    /// client's own header.
    pub mask_host: String,
    /// A pause at the deadline keeps the disk only.
    pub disk_only: bool,
    /// The sandbox is paused and its memory is ignored. It boots when it is resumed.
    pub paused_disk_only: bool,
    /// Parameters of the resume in progress; `None` if there is none. Written before the host is
    /// called, so that they are known when the row is settled later.
    pub resuming: Option<ResumeAs>,
    /// Internet access as requested by the client. `None`: not requested, `egress` is the service's
    /// default.
    pub internet: Option<bool>,
    /// Exceptions from `egress`.
    pub network: NetworkLists,
    /// CPU model of the VM, as last reported by the host. Empty before the first start.
    pub cpu: String,
    /// Accelerator of the VM (`kvm`, `tcg`), as last reported by the host. Empty before the first
    /// start.
    pub accel: String,
    /// SHA-256 of the create request, hexadecimal, if the request had an idempotency key.
    pub request_hash: String,
}

/// Parameters of a resume.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResumeAs {
    /// Boot from the disk, even if memory was saved.
    pub disk_only: bool,
    /// Seconds from the resume to the deadline. `None`: the lifetime from the sandbox's creation.
    pub lifetime_sec: Option<u32>,
}

/// Addresses and CIDR blocks that may, or may not, be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkLists {
    /// Takes precedence over `deny`.
    pub allow: Vec<String>,
    /// Never reached, unless `allow` contains it.
    pub deny: Vec<String>,
}
