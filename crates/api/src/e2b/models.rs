//! Response bodies of the E2B API. The contract fixes the field names.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;
use wrenn_control::clock;
use wrenn_db::Sandbox as Row;
use wrenn_model::{Egress, OnTimeout, SandboxStatus, limits};
use wrenn_proto::guest;

use super::names::Shown;

/// `clientID` of all responses: there is one host.
const CLIENT_ID: &str = "wrenn";

/// Version of the API that a call belongs to. Paths without a version belong to version 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    /// Version 2, in which every sandbox requires a token for its guest agent.
    V2,
}

/// Access data of a sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct E2bSandbox {
    /// Template from which the sandbox was created.
    #[serde(rename = "templateID")]
    template_id: String,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    /// Same value for all sandboxes.
    #[serde(rename = "clientID")]
    client_id: &'static str,
    /// Version of the contract that the guest agent implements.
    envd_version: &'static str,
    /// Name of the template.
    alias: String,
    /// Token that the guest agent requires. Absent in version 1 if the guest agent requires none.
    #[serde(skip_serializing_if = "Option::is_none")]
    envd_access_token: Option<String>,
    /// Token that the other ports require; null if they require none.
    traffic_access_token: Option<String>,
    /// Always null. Clients find sandboxes by their own settings.
    domain: Option<String>,
}

impl E2bSandbox {
    /// Builds the response of a call of this version.
    pub(super) fn of(row: &Row, version: Version) -> Self {
        Self {
            template_id: row.template.clone(),
            sandbox_id: row.id.to_string(),
            client_id: CLIENT_ID,
            envd_version: guest::ENVD_CONTRACT_VERSION,
            alias: Shown::of(&row.template).name,
            envd_access_token: envd_token(row, version),
            traffic_access_token: given(&row.options.traffic_token),
            domain: None,
        }
    }
}

/// State of a sandbox: running or paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum E2bState {
    Running,
    Paused,
}

impl E2bState {
    /// Returns the statuses that clients see as this state.
    pub(super) const fn statuses(self) -> &'static [SandboxStatus] {
        match self {
            Self::Running => &[SandboxStatus::Running],
            Self::Paused => &[
                SandboxStatus::Pausing,
                SandboxStatus::Paused,
                SandboxStatus::Resuming,
            ],
        }
    }

    /// Returns the state that clients see; `None` if the sandbox is booting or has ended.
    pub(super) fn of(status: SandboxStatus) -> Option<Self> {
        [Self::Running, Self::Paused]
            .into_iter()
            .find(|state| state.statuses().contains(&status))
    }
}

/// A sandbox in a list.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct E2bListedSandbox {
    #[serde(rename = "templateID")]
    template_id: String,
    /// Name of the template.
    alias: String,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    #[serde(rename = "clientID")]
    client_id: &'static str,
    #[schema(value_type = String, format = DateTime)]
    started_at: Timestamp,
    /// Deadline of the sandbox.
    #[schema(value_type = String, format = DateTime)]
    end_at: Timestamp,
    cpu_count: u32,
    #[serde(rename = "memoryMB")]
    memory_mb: u32,
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u32,
    metadata: BTreeMap<String, String>,
    state: E2bState,
    envd_version: &'static str,
}

impl E2bListedSandbox {
    pub(super) fn of(row: &Row, state: E2bState) -> Self {
        Self {
            template_id: row.template.clone(),
            alias: Shown::of(&row.template).name,
            sandbox_id: row.id.to_string(),
            client_id: CLIENT_ID,
            started_at: clock::timestamp(row.started_at),
            end_at: end_at(row),
            cpu_count: row.size.vcpus,
            memory_mb: row.size.memory_mib,
            disk_size_mb: row.size.disk_mib,
            metadata: row.metadata.clone(),
            state,
            envd_version: guest::ENVD_CONTRACT_VERSION,
        }
    }
}

/// All data of a sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct E2bSandboxDetail {
    #[serde(flatten)]
    listed: E2bListedSandbox,
    #[serde(skip_serializing_if = "Option::is_none")]
    envd_access_token: Option<String>,
    domain: Option<String>,
    /// Access to the internet; null if the client left the choice to the server.
    allow_internet_access: Option<bool>,
    network: E2bNetwork,
    lifecycle: E2bLifecycle,
    /// Saved parts of a paused sandbox: `full` or `filesystem`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pause_mode: Option<&'static str>,
    /// Always empty.
    volume_mounts: Vec<String>,
}

/// Network access from and to a sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct E2bNetwork {
    allow_out: Vec<String>,
    deny_out: Vec<String>,
    /// True if the ports require no token.
    allow_public_traffic: bool,
    /// `Host` of requests, as the servers in the sandbox see it.
    #[serde(skip_serializing_if = "Option::is_none")]
    mask_request_host: Option<String>,
}

/// Behavior of a sandbox at its deadline and while it is paused.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct E2bLifecycle {
    auto_resume: bool,
    /// `kill` or `pause`.
    on_timeout: &'static str,
}

impl E2bSandboxDetail {
    pub(super) fn of(row: &Row, state: E2bState) -> Self {
        let options = &row.options;
        let pause_mode = match (state, options.paused_disk_only) {
            (E2bState::Running, _) => None,
            (E2bState::Paused, true) => Some("filesystem"),
            (E2bState::Paused, false) => Some("full"),
        };
        Self {
            envd_access_token: envd_token(row, Version::V1),
            domain: None,
            // For a sandbox of the `/v1` API, which has no such field, the effective setting is
            // returned.
            allow_internet_access: match options.lifetime_sec {
                0 => Some(row.egress == Egress::Allow),
                _ => options.internet,
            },
            network: E2bNetwork {
                allow_out: options.network.allow.clone(),
                deny_out: options.network.deny.clone(),
                allow_public_traffic: options.traffic_token.is_empty(),
                mask_request_host: given(&options.mask_host),
            },
            lifecycle: E2bLifecycle {
                auto_resume: row.auto_resume,
                on_timeout: match row.on_timeout {
                    OnTimeout::Kill => "kill",
                    OnTimeout::Pause => "pause",
                },
            },
            pause_mode,
            volume_mounts: Vec::new(),
            listed: E2bListedSandbox::of(row, state),
        }
    }
}

/// Resource usage of a sandbox at a point in time.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct E2bMetric {
    #[schema(value_type = String, format = DateTime)]
    pub(super) timestamp: Timestamp,
    /// Seconds since 1970.
    pub(super) timestamp_unix: i64,
    pub(super) cpu_count: u32,
    pub(super) cpu_used_pct: f64,
    /// Used memory, in bytes. All memory and disk fields are in bytes.
    pub(super) mem_used: u64,
    pub(super) mem_total: u64,
    pub(super) mem_cache: u64,
    pub(super) disk_used: u64,
    pub(super) disk_total: u64,
}

/// Snapshot of a sandbox, from which sandboxes can be created.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct E2bSnapshot {
    /// Id of the snapshot, accepted as `templateID` of a create.
    #[serde(rename = "snapshotID")]
    snapshot_id: String,
    /// Names with namespace; empty for an unnamed snapshot.
    names: Vec<String>,
}

impl E2bSnapshot {
    /// Builds the response from the template's internal name.
    pub(super) fn of(internal: &str) -> Self {
        let shown = Shown::of(internal);
        Self {
            snapshot_id: shown.id(),
            names: shown.names(),
        }
    }
}

/// Returns the token of the guest agent. In version 1, `None` if the guest agent requires none.
fn envd_token(row: &Row, version: Version) -> Option<String> {
    if row.options.open && version == Version::V1 {
        return None;
    }
    given(&row.envd_token)
}

fn given(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// Returns the end of a sandbox's life. A sandbox without a deadline ends when its idle time runs
/// out, or else after the longest timeout that a client can request.
fn end_at(row: &Row) -> Timestamp {
    let seconds = |sec: u32| i64::from(sec) * 1000;
    clock::timestamp(match (row.expires_at, row.timeout_sec) {
        (0, 0) => clock::now_ms() + seconds(limits::MAX_TIMEOUT_SEC),
        (0, idle) => row.last_active_at.max(row.started_at) + seconds(idle),
        (expires_at, _) => expires_at,
    })
}
