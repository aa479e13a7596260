//! JSON types of the public REST API. Field names are part of the contract. Readers must treat new
//! fields as optional.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Body of every error response.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// Details of the error.
    pub error: ErrorDetail,
}

/// Details of an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// Error code for programs: `invalid_request`, `unauthorized`, `not_found`, `invalid_state`,
    /// `conflict`, `already_exists`, `too_large`, `resource_exhausted`, `agent_error`,
    /// `unavailable`, `timeout`, `db_error`, `internal`.
    pub code: String,
    /// Human-readable message. Names the affected field, file or resource, if there is one.
    pub message: String,
}

/// Lifecycle status of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SandboxStatus {
    /// Accepted. The create has not been sent to the host yet.
    Pending,
    /// The VM is booting.
    Starting,
    /// Ready for use.
    Running,
    /// Memory, CPU state and disk are being saved.
    Pausing,
    /// Saved. Only files are left on the host. The sandbox can be resumed.
    Paused,
    /// The saved state is being restored.
    Resuming,
    /// The sandbox is being destroyed.
    Stopping,
    /// Destroyed. The record can still be read.
    Stopped,
    /// The VM was lost or did not start; `error` contains the reason. All resources are freed.
    Error,
}

impl SandboxStatus {
    /// All values, in lifecycle order.
    pub const ALL: [Self; 9] = [
        Self::Pending,
        Self::Starting,
        Self::Running,
        Self::Pausing,
        Self::Paused,
        Self::Resuming,
        Self::Stopping,
        Self::Stopped,
        Self::Error,
    ];

    /// Returns the name used on the wire and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Error => "error",
        }
    }

    /// Returns the status with this name, or `None` if there is none.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.as_str() == word)
    }
}

impl std::fmt::Display for SandboxStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Network access of a sandbox to addresses beyond its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Egress {
    /// No traffic leaves the sandbox.
    Deny,
    /// Connections to addresses beyond the host are allowed. The host and other sandboxes remain
    /// unreachable.
    Allow,
}

impl std::str::FromStr for Egress {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "deny" => Ok(Self::Deny),
            "allow" => Ok(Self::Allow),
            _ => Err(format!("expected `allow` or `deny`, got `{s}`")),
        }
    }
}

/// Action when a sandbox has been idle for `timeout_sec`, or reaches `expires_at`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnTimeout {
    /// Pauses the sandbox. If the pause fails, the sandbox keeps running and the pause is retried
    /// later.
    #[default]
    Pause,
    /// Destroys the sandbox.
    Kill,
}

impl OnTimeout {
    /// Returns the name used on the wire and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Kill => "kill",
        }
    }
}

impl std::str::FromStr for OnTimeout {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "pause" => Ok(Self::Pause),
            "kill" => Ok(Self::Kill),
            _ => Err(format!("expected `pause` or `kill`, got `{s}`")),
        }
    }
}

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
    /// Sandbox id: `sb-` and 8 hexadecimal digits, or `i` and 20 lower-case letters and digits if
    /// the sandbox was created through the E2B API.
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

/// Time from the start of the create on the host to the end of each step, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BootTimes {
    /// Disk, network and cgroups were ready.
    pub prepared_ms: u32,
    /// The VMM sent its first response.
    pub vmm_started_ms: u32,
    /// The guest kernel started its first program.
    pub kernel_ms: u32,
    /// The guest's init started the guest agent.
    pub init_ms: u32,
    /// The guest agent sent its first response.
    pub envd_ms: u32,
}

/// Body of `POST /v1/sandboxes/{id}/exec`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// Program, looked up in `PATH`.
    pub cmd: String,
    /// Arguments of the program.
    #[serde(default)]
    pub args: Vec<String>,
    /// Environment variables added to the sandbox's environment.
    #[serde(default)]
    pub envs: BTreeMap<String, String>,
    /// Working directory. Default: the user's home directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// User that runs the program. Default: defined by the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Time until the program is killed, in seconds; 0 means never; default 30 (0 with
    /// `background`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<i64>,
    /// Respond with 202 as soon as the process has started, and leave it running.
    #[serde(default)]
    pub background: bool,
    /// Name by which the process can be found later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

/// Response of a foreground exec (200).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExecResult {
    /// Sandbox id.
    pub sandbox_id: String,
    /// Program that was run.
    pub cmd: String,
    /// Standard output, encoded as `encoding` says.
    pub stdout: String,
    /// Standard error, encoded as `encoding` says.
    pub stderr: String,
    /// Exit code; -1 if a signal ended the program.
    pub exit_code: i32,
    /// Reason for an end other than an exit, such as `signal: killed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Wall-clock duration as measured by the server, in milliseconds.
    pub duration_ms: u64,
    /// `utf-8`, or `base64` for both streams if either is not UTF-8.
    pub encoding: String,
}

/// Response of a background exec (202).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BackgroundProcess {
    /// Sandbox id.
    pub sandbox_id: String,
    /// Program that is running.
    pub cmd: String,
    /// Process id in the guest.
    pub pid: u32,
    /// Tag of the process.
    pub tag: String,
}

/// Response of `GET /v1/sandboxes/{id}/processes`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProcessList {
    /// Running processes that were started through the API.
    pub processes: Vec<Process>,
}

/// Running process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Process {
    /// Process id in the guest.
    pub pid: u32,
    /// Tag of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// Program.
    pub cmd: String,
    /// Arguments of the program.
    pub args: Vec<String>,
}

/// Body of `/files/read`, `/files/stream/read`, `/files/mkdir` and `/files/remove`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FilePath {
    /// Path in the guest. `~` is the user's home directory, and a relative path starts there.
    pub path: String,
    /// User whose home directory and ownership apply. Default: defined by the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Body of `/files/list`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ListFiles {
    /// Directory in the guest.
    pub path: String,
    /// Depth of the listing; default 1, the direct children.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<i64>,
    /// User whose home directory applies. Default: defined by the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Response of `/files/list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FileList {
    /// Entries, each directory before its contents.
    pub entries: Vec<FileEntry>,
}

/// Response of `/files/mkdir`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FileEntryReply {
    /// Created entry.
    pub entry: FileEntry,
}

/// File, directory or symbolic link.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FileEntry {
    /// Last component of the path.
    pub name: String,
    /// Path.
    pub path: String,
    /// `file`, `directory`, `symlink` or `unknown`. For a symbolic link: the type of its target.
    #[serde(rename = "type")]
    pub kind: String,
    /// Size, in bytes.
    pub size: i64,
    /// Permission bits (0o644 is 420).
    pub mode: u32,
    /// Permissions in the format of `ls -l`.
    pub permissions: String,
    /// Name of the owner.
    pub owner: String,
    /// Name of the group.
    pub group: String,
    /// Time of the last modification.
    #[schema(value_type = String, format = DateTime)]
    pub modified_at: Timestamp,
    /// Target of a symbolic link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
}

/// Response of `GET /v1/sandboxes/{id}/metrics`: current usage of a running sandbox, last known
/// usage of a paused sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Metrics {
    /// Sandbox id.
    pub sandbox_id: String,
    /// Time of the measurement, in seconds since 1970.
    pub timestamp_unix: i64,
    /// Number of virtual CPUs.
    pub cpu_count: u32,
    /// Used share of all virtual CPUs, in percent.
    pub cpu_pct: f64,
    /// Used memory, in bytes.
    pub mem_bytes: u64,
    /// Total memory, in bytes.
    pub mem_total_bytes: u64,
    /// Used disk space, in bytes.
    pub disk_bytes: u64,
    /// Total disk space, in bytes.
    pub disk_total_bytes: u64,
    /// Usage within the requested range, oldest point first: one point per 15 s for the last hour,
    /// one per 5 min before that.
    #[serde(default)]
    pub points: Vec<MetricsPoint>,
}

/// Usage of a sandbox at one point in time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MetricsPoint {
    /// Time of the measurement, in seconds since 1970.
    pub timestamp_unix: i64,
    /// Used share of all virtual CPUs, in percent.
    pub cpu_pct: f64,
    /// Used memory, in bytes.
    pub mem_bytes: u64,
    /// Used disk space, in bytes.
    pub disk_bytes: u64,
}

/// Body of `POST /v1/sandboxes/{id}/fork`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkSandbox {
    /// Number of copies, 1 to 100; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<i64>,
}

/// Body of `POST /v1/snapshots`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Id of the sandbox, which must be running or paused. Its status does not change.
    pub sandbox_id: String,
    /// Name of the new template; default `template-` and 8 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Template, as returned by `GET /v1/templates` and `GET /v1/snapshots`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// Template name.
    pub name: String,
    /// `base`: an image that sandboxes boot from. `snapshot`: a snapshot of a sandbox that other
    /// sandboxes start from; they have its sizes.
    #[serde(rename = "type")]
    pub kind: String,
    /// Number of virtual CPUs of a sandbox whose create request does not specify it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Memory of a sandbox whose create request does not specify it, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u32>,
    /// Disk size, in MiB; absent if the create request can choose it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<u32>,
    /// Generation of the memory: the number of earlier snapshots that it derives from. Only for
    /// type `snapshot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u32>,
    /// Size on the host's disk, in bytes.
    pub size_bytes: u64,
    /// Time of creation.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
}

/// Body of `POST /v1/api-keys`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateApiKey {
    /// Purpose of the key, chosen by the user.
    pub name: String,
    /// Create a key in the format that E2B's clients expect: `e2b_` and 40 hexadecimal digits;
    /// default false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub e2b: bool,
}

/// API key without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiKey {
    /// Id of the key, used to delete it.
    pub id: String,
    /// Purpose of the key.
    pub name: String,
    /// First eight characters of the secret.
    pub prefix: String,
    /// Time of creation.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// Time of the last use. Updated at most once per minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub last_used_at: Option<Timestamp>,
}

/// Response of `POST /v1/api-keys`. The secret is shown only here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedApiKey {
    /// Secret: `wrn_` and 32 hexadecimal digits, or `e2b_` and 40. Cannot be retrieved later.
    pub key: String,
    /// Record of the key.
    pub api_key: ApiKey,
}

/// Response of `GET /health`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Always `ok`.
    pub status: String,
    /// Version of the server.
    pub version: String,
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
    pub created_at: jiff::Timestamp,
}

/// Host that runs sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Id of the host agent's data directory.
    pub id: String,
    /// Id of the control plane's database.
    pub installation_id: String,
    /// Version of the host agent.
    pub version: String,
    /// Accelerator: `kvm` (hardware virtualization) or `tcg` (software emulation).
    pub accel: String,
    /// Number of processors.
    pub cpu_count: u32,
    /// Total memory, in MiB.
    pub memory_total_mb: u64,
    /// Available memory, in MiB.
    pub memory_available_mb: u64,
    /// Free disk space of the data directory, in MiB.
    pub disk_free_mb: u64,
    /// Number of sandboxes, including paused ones.
    pub sandboxes: u32,
    /// Boots since the host agent started.
    pub boots: BootCounts,
}

/// Number of boots from disk since the host agent started. A restore from a snapshot is not a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BootCounts {
    /// Boots that were started.
    pub started: u64,
    /// Attempts that were made because the previous attempt of the same boot made no progress.
    pub retried: u64,
    /// Boots that failed because their last attempt made no progress.
    pub stalled: u64,
}
