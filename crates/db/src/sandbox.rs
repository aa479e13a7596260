//! Rows of sandboxes.

pub(crate) mod statements;

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};
use sqlx::FromRow;
use wrenn_model::{BootTimes, Egress, MachineSize, OnTimeout, SandboxId, SandboxStatus, TeamId};

use crate::{options::Options, word::Word};

/// Columns of [`Sandbox`], beginning with its key.
macro_rules! columns {
    () => {
        "id, template, status, version, vcpus, memory_mb, disk_size_mb, timeout_sec, egress, guest_ip, host_ip, \
         metadata, error, boot, created_at, started_at, last_active_at, last_updated, on_timeout, auto_resume, warning, \
         expires_at, envd_token, options, idempotency_key, host_id, team_id"
    };
}

pub(crate) use columns;

/// Maximum number of rows per list.
pub const MAX_LIST: u32 = 1000;

/// Row of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct Sandbox {
    /// Sandbox id.
    #[sqlx(try_from = "String")]
    pub id: SandboxId,
    /// Template that the sandbox was created from.
    pub template: String,
    /// Lifecycle status.
    #[sqlx(try_from = "Word")]
    pub status: SandboxStatus,
    /// Number of changes so far.
    pub version: i64,
    /// Virtual CPUs, memory and disk.
    #[sqlx(flatten, try_from = "SizeColumns")]
    pub size: MachineSize,
    /// Idle time until `on_timeout` is applied, in seconds; 0 means never.
    #[sqlx(try_from = "i64")]
    pub timeout_sec: u32,
    /// Action when the sandbox was idle for `timeout_sec` or has reached `expires_at`.
    #[sqlx(try_from = "Word")]
    pub on_timeout: OnTimeout,
    /// True if a call to the paused sandbox resumes it.
    pub auto_resume: bool,
    /// Network access to addresses beyond the host.
    #[sqlx(try_from = "Word")]
    pub egress: Egress,
    /// Address of the guest on its own link; empty if unknown.
    pub guest_ip: String,
    /// Address of the guest as seen from the host; empty if unknown.
    pub host_ip: String,
    /// User-defined key-value pairs.
    #[sqlx(json)]
    pub metadata: BTreeMap<String, String>,
    /// Reason for the status `error`, or party that stopped the sandbox; otherwise empty.
    pub error: String,
    /// Last step that failed and left the sandbox unchanged; empty if there is none.
    pub warning: String,
    /// Durations of the phases of the boot.
    #[sqlx(json(nullable))]
    pub boot: Option<BootTimes>,
    /// Creation time, in milliseconds since 1970.
    pub created_at: i64,
    /// Time of the first start, in milliseconds since 1970; 0 before it.
    pub started_at: i64,
    /// Time of the last activity, in milliseconds since 1970; 0 before the first.
    pub last_active_at: i64,
    /// Time of the last change of the row, in milliseconds since 1970.
    pub last_updated: i64,
    /// Time at which `on_timeout` is applied regardless of activity, in milliseconds since 1970; 0
    /// means never.
    pub expires_at: i64,
    /// Token that the guest agent requires from its clients; empty before the first start.
    pub envd_token: String,
    /// Rarely used options.
    #[sqlx(json)]
    pub options: Options,
    /// Idempotency key of the request that created the sandbox; empty if it had none.
    pub idempotency_key: String,
    /// Host that has the sandbox; [`UNKNOWN_HOST`] in a row of an earlier release.
    pub host_id: String,
    /// Team that owns the sandbox.
    #[sqlx(rename = "team_id", try_from = "Word")]
    pub team: TeamId,
}

/// Columns of a [`MachineSize`].
#[derive(FromRow)]
struct SizeColumns {
    #[sqlx(try_from = "i64")]
    vcpus: u32,
    #[sqlx(try_from = "i64")]
    memory_mb: u32,
    #[sqlx(try_from = "i64")]
    disk_size_mb: u32,
}

impl From<SizeColumns> for MachineSize {
    fn from(columns: SizeColumns) -> Self {
        Self {
            vcpus: columns.vcpus,
            memory_mib: columns.memory_mb,
            disk_mib: columns.disk_size_mb,
        }
    }
}

/// State of a sandbox: the columns that a task needs which looks at all sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct StateRow {
    /// Sandbox id.
    #[sqlx(try_from = "String")]
    pub id: SandboxId,
    /// Lifecycle status.
    #[sqlx(try_from = "Word")]
    pub status: SandboxStatus,
    /// Version of the row.
    pub version: i64,
    /// Idle time until `on_timeout` is applied, in seconds; 0 means never.
    #[sqlx(try_from = "i64")]
    pub timeout_sec: u32,
    /// Time of the first start, in milliseconds since 1970; 0 before it.
    pub started_at: i64,
    /// Time of the last activity, in milliseconds since 1970; 0 before the first.
    pub last_active_at: i64,
    /// Host that has the sandbox.
    pub host_id: String,
    /// True if the row has a warning.
    pub is_warned: bool,
}

/// Row of a sandbox that has ended.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct EndedRow {
    /// Sandbox id.
    #[sqlx(try_from = "String")]
    pub id: SandboxId,
    /// Version of the row.
    pub version: i64,
    /// Time of the end, in milliseconds since 1970.
    pub last_updated: i64,
}

/// Metadata of a sandbox.
#[derive(Debug, FromRow)]
pub(crate) struct MetadataRow {
    /// User-defined key-value pairs.
    #[sqlx(json)]
    pub(crate) metadata: BTreeMap<String, String>,
}

/// Deadline of a running sandbox.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct DeadlineRow {
    /// Sandbox id.
    #[sqlx(try_from = "String")]
    pub id: SandboxId,
    /// Host that has the sandbox.
    pub host_id: String,
    /// Version of the row.
    pub version: i64,
    /// Deadline, in milliseconds since 1970.
    pub expires_at: i64,
}

/// Returns the hash by which the sandbox of a guest agent's token is found; empty without a token.
pub(crate) fn token_hash(token: &str) -> String {
    if token.is_empty() {
        return String::new();
    }
    hex::encode(Sha256::digest(token))
}

/// Host of a row that was written before hosts had ids.
pub const UNKNOWN_HOST: &str = "default";

impl Sandbox {
    /// Restarts the lifetime, with the length that the resume in progress requests, otherwise
    /// with the length from the sandbox's creation. A sandbox without a lifetime has no deadline
    /// afterwards.
    pub fn renew_lifetime(&mut self, now_ms: i64) {
        let asked = self.options.resuming.and_then(|how| how.lifetime_sec);
        let own = Some(self.options.lifetime_sec).filter(|sec| *sec > 0);
        self.expires_at = asked
            .or(own)
            .map_or(0, |sec| now_ms + i64::from(sec) * 1000);
    }

    /// True if a call to the paused sandbox resumes it. A sandbox that was paused without its
    /// memory would boot. Only its user may request that, because a call expects the processes that
    /// ran before.
    #[must_use]
    pub fn wakes(&self) -> bool {
        self.auto_resume && !self.options.paused_disk_only
    }
}
