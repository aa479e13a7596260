//! What the E2B API's answers look like. Field names are the contract's.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;
use wrenn_proto::{
    limits,
    rest::{Egress, OnTimeout, SandboxStatus},
};

use super::names::Shown;
use crate::{clock, db::sandboxes::Sandbox as Row};

/// What every answer says of its client: there is one host.
const CLIENT_ID: &str = "wrenn";

/// Which version of the API a call is of; what has no number in its path is of the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    /// It knows no sandboxes whose guest agent needs no token.
    V2,
}

/// How a client reaches a sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct E2bSandbox {
    /// Template it was made from.
    #[serde(rename = "templateID")]
    template_id: String,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    /// The same for all.
    #[serde(rename = "clientID")]
    client_id: &'static str,
    /// The contract that its guest agent keeps.
    envd_version: &'static str,
    /// The template's name.
    alias: String,
    /// What the guest agent asks of clients; in the first version none where they need none.
    #[serde(skip_serializing_if = "Option::is_none")]
    envd_access_token: Option<String>,
    /// What its other ports ask of clients; none where they ask nothing.
    traffic_access_token: Option<String>,
    /// Always none: clients are told where sandboxes are by their own settings.
    domain: Option<String>,
}

impl E2bSandbox {
    /// As the answer of a call of this version.
    pub(super) fn of(row: &Row, version: Version) -> Self {
        Self {
            template_id: row.template.clone(),
            sandbox_id: row.id.to_string(),
            client_id: CLIENT_ID,
            envd_version: limits::ENVD_CONTRACT_VERSION,
            alias: Shown::of(&row.template).name,
            envd_access_token: envd_token(row, version),
            traffic_access_token: given(&row.options.traffic_token),
            domain: None,
        }
    }
}

/// Running or paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum E2bState {
    Running,
    Paused,
}

impl E2bState {
    /// Statuses that clients see as this.
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

    /// What clients see; nothing of one that boots or has ended.
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
    /// The template's name.
    alias: String,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    #[serde(rename = "clientID")]
    client_id: &'static str,
    #[schema(value_type = String, format = DateTime)]
    started_at: Timestamp,
    /// Its deadline.
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
            cpu_count: row.vcpus,
            memory_mb: row.memory_mb,
            disk_size_mb: row.disk_size_mb,
            metadata: row.metadata.clone(),
            state,
            envd_version: limits::ENVD_CONTRACT_VERSION,
        }
    }
}

/// All of a sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct E2bSandboxDetail {
    #[serde(flatten)]
    listed: E2bListedSandbox,
    #[serde(skip_serializing_if = "Option::is_none")]
    envd_access_token: Option<String>,
    domain: Option<String>,
    /// Whether it may reach the world; none if its client left that to this server.
    allow_internet_access: Option<bool>,
    network: E2bNetwork,
    lifecycle: E2bLifecycle,
    /// What of a paused sandbox was kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pause_mode: Option<&'static str>,
    /// Always empty.
    volume_mounts: Vec<String>,
}

/// What a sandbox may reach, and who may reach it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct E2bNetwork {
    allow_out: Vec<String>,
    deny_out: Vec<String>,
    /// Whether its ports need no token.
    allow_public_traffic: bool,
    /// What its servers see as the host of requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    mask_request_host: Option<String>,
}

/// What becomes of it when its time is over.
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
            // One that was made by another API has no choice of a client's to tell.
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

/// What a sandbox used at a moment.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct E2bMetric {
    #[schema(value_type = String, format = DateTime)]
    pub(super) timestamp: Timestamp,
    /// Seconds since 1970.
    pub(super) timestamp_unix: i64,
    pub(super) cpu_count: u32,
    pub(super) cpu_used_pct: f64,
    /// Bytes, as all that follow.
    pub(super) mem_used: u64,
    pub(super) mem_total: u64,
    pub(super) mem_cache: u64,
    pub(super) disk_used: u64,
    pub(super) disk_total: u64,
}

/// A moment of a sandbox, from which others can be made.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct E2bSnapshot {
    /// What a create takes as its `templateID`.
    #[serde(rename = "snapshotID")]
    snapshot_id: String,
    /// Its names with their namespace; none if nobody named it.
    names: Vec<String>,
}

impl E2bSnapshot {
    /// Of a template that is called so here.
    pub(super) fn of(internal: &str) -> Self {
        let shown = Shown::of(internal);
        Self {
            snapshot_id: shown.id(),
            names: shown.names(),
        }
    }
}

/// The token of its guest agent. Clients of the first version are told of none where they need none.
fn envd_token(row: &Row, version: Version) -> Option<String> {
    if row.options.open && version == Version::V1 {
        return None;
    }
    given(&row.envd_token)
}

fn given(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// When it ends. One without a deadline has an idle time that may run out, or lives for as long as can be asked for.
fn end_at(row: &Row) -> Timestamp {
    let seconds = |sec: u32| i64::from(sec) * 1000;
    clock::timestamp(match (row.expires_at, row.timeout_sec) {
        (0, 0) => clock::now_ms() + seconds(limits::MAX_TIMEOUT_SEC),
        (0, idle) => row.last_active_at.max(row.started_at) + seconds(idle),
        (expires_at, _) => expires_at,
    })
}
