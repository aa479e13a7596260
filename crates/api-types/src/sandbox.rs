//! Sandboxes.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wrenn_model::{BootTimes, Egress, OnTimeout, SandboxStatus};

use crate::Isolation;

/// Body of `POST /v1/sandboxes`. Every field has a default. A template that was created from a
/// sandbox defines `vcpus`, `memory_mb` and `disk_size_mb` itself; for such a template these fields
/// are ignored.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSandbox {
    /// Template name; default `minimal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Number of virtual CPUs. Default: defined by the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<i64>,
    /// Memory, in MiB. Default: defined by the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<i64>,
    /// Disk size as seen by the guest, in MiB; default 5120.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<i64>,
    /// Idle time until `on_timeout` is applied, in seconds; 0 means never; default 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<i64>,
    /// Action when the sandbox has been idle for `timeout_sec`: `pause` (default) or `kill`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<OnTimeout>,
    /// True if a call to the paused sandbox resumes it. Default false: such a call is rejected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_resume: Option<bool>,
    /// Network access to addresses beyond the host. Default: the server's setting (`deny` unless
    /// configured).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
    /// Environment of every process in the sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envs: Option<BTreeMap<String, String>>,
    /// User-defined key-value pairs, returned unchanged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
}

/// Record of a sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sandbox {
    /// Sandbox id: `sb-` and 20 lower-case letters and digits, or `i` and 20 of them if the sandbox
    /// was created through the E2B API. Sandboxes of earlier releases have `sb-` and 8 hexadecimal
    /// digits.
    pub id: String,
    /// Lifecycle status.
    pub status: SandboxStatus,
    /// Template from which the sandbox was created.
    pub template: String,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// Memory, in MiB.
    pub memory_mb: u32,
    /// Disk size as seen by the guest, in MiB.
    pub disk_size_mb: u32,
    /// Idle time until `on_timeout` is applied, in seconds; 0 means never.
    pub timeout_sec: u32,
    /// Action when the sandbox has been idle for `timeout_sec`, or at `expires_at`.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// True if a call to the paused sandbox resumes it.
    #[serde(default)]
    pub auto_resume: bool,
    /// Network access to addresses beyond the host.
    pub egress: Egress,
    /// Address of the guest inside the sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_ip: Option<String>,
    /// Address of the guest as seen from the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<String>,
    /// User-defined key-value pairs.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// Reason for status `error`, or for a stop that the user did not request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Message about the last lifecycle step that failed without ending the sandbox, such as a
    /// pause, or about a lost VM that was returned to its last snapshot. Removed when a step
    /// succeeds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// Times of the boot steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootTimes>,
    /// CPU model of the virtual machine, in QEMU's notation, such as `host`. A paused sandbox
    /// continues with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// Isolation of the virtual machine from its host. Absent before the first start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
    /// Time of the create request.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// Time at which the sandbox first became ready for use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub started_at: Option<Timestamp>,
    /// Time of the last activity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub last_active_at: Option<Timestamp>,
    /// Time of the last change of this record.
    #[schema(value_type = String, format = DateTime)]
    pub last_updated: Timestamp,
    /// Time at which `on_timeout` is applied even if the sandbox is active. Only for sandboxes with
    /// such a deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires_at: Option<Timestamp>,
}

/// Body of `POST /v1/sandboxes/{id}/fork`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkSandbox {
    /// Number of copies, 1 to 100; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<i64>,
}

/// Request body of `POST /v1/sandboxes/{id}/resume`. The body may be omitted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResumeSandbox {
    /// If false, the sandbox boots from its disk, as after a power failure, and its memory is not
    /// used. Default true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<bool>,
}

/// Sandbox that exists on the host, running or paused, and is not in the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnknownSandbox {
    /// Sandbox id.
    pub id: String,
    /// State on the host: `starting`, `running`, `pausing`, `paused`, `resuming`, `stopping` or
    /// `error`.
    pub state: String,
    /// Template from which the sandbox was created.
    pub template: String,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// Memory, in MiB.
    pub memory_mb: u32,
    /// Id of the installation (the database) whose control plane created or adopted the sandbox;
    /// null if it is not recorded.
    pub installation_id: Option<String>,
    /// Time of creation.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
}
