//! The JSON of the public REST API. Field names are the contract; a new field is optional for readers.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Body of every failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// One word for programs: `invalid_request`, `unauthorized`, `not_found`, `invalid_state`, `conflict`,
    /// `already_exists`, `too_large`, `resource_exhausted`, `agent_error`, `unavailable`, `timeout`, `db_error`, `internal`.
    pub code: String,
    /// A sentence for people; names the field or file and what to do.
    pub message: String,
}

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SandboxStatus {
    /// Accepted; its host has not begun yet.
    Pending,
    /// Its machine boots.
    Starting,
    /// It can be used.
    Running,
    /// Its memory, processor and disk are being saved.
    Pausing,
    /// It is saved, and has nothing on its host but files. It can be resumed.
    Paused,
    /// It is being brought back to where it stood.
    Resuming,
    /// It is being destroyed.
    Stopping,
    /// It was destroyed. Its record stays readable.
    Stopped,
    /// Its machine was lost or never came up; `error` says why. All its resources are freed.
    Error,
}

impl SandboxStatus {
    /// All values, in the order of a life.
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

    /// The word used on the wire and in the database.
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

    /// The value of a word; `None` if there is none.
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

/// Whether a sandbox may reach what lies beyond its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Egress {
    /// Nothing leaves the sandbox.
    Deny,
    /// Connections to the world beyond the host, never to the host or to other sandboxes.
    Allow,
}

impl std::str::FromStr for Egress {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "deny" => Ok(Self::Deny),
            "allow" => Ok(Self::Allow),
            _ => Err(format!("`{s}` is neither `allow` nor `deny`")),
        }
    }
}

/// What becomes of a sandbox that nobody has used for its `timeout_sec`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnTimeout {
    /// It is paused. If that fails it runs on, and is tried again later.
    #[default]
    Pause,
    /// It is destroyed.
    Kill,
}

impl OnTimeout {
    /// The word used on the wire and in the database.
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
            _ => Err(format!("`{s}` is neither `pause` nor `kill`")),
        }
    }
}

/// Body of `POST /v1/sandboxes`. Every field has a default. The numbers of processors, memory and disk of a template that
/// was made from a sandbox are its own: what the request says of them is then passed over.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSandbox {
    /// Template name; default `minimal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Virtual CPUs; default: the template's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<i64>,
    /// Memory, MiB; default: the template's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<i64>,
    /// Size of the disk as the guest sees it, MiB; default 5120.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<i64>,
    /// Seconds without use after which `on_timeout` happens; 0 means never; default 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<i64>,
    /// What happens then: `pause` (default) or `kill`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<OnTimeout>,
    /// Whether a call to it resumes it when it is paused; default false: such a call is then refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_resume: Option<bool>,
    /// Whether it may reach what lies beyond the host; default: the server's setting (`deny` unless configured).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
    /// Environment of every process in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envs: Option<BTreeMap<String, String>>,
    /// Free words of the user's, returned as they were given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
}

/// A sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sandbox {
    /// `sb-` and 8 hexadecimal digits.
    pub id: String,
    /// Where it is in its life.
    pub status: SandboxStatus,
    /// Template it was made from.
    pub template: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mb: u32,
    /// Size of the disk as the guest sees it, MiB.
    pub disk_size_mb: u32,
    /// Seconds without use after which `on_timeout` happens; 0 means never.
    pub timeout_sec: u32,
    /// What happens then.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// Whether a call to it resumes it when it is paused.
    #[serde(default)]
    pub auto_resume: bool,
    /// Whether it may reach what lies beyond the host.
    pub egress: Egress,
    /// Address of the guest as it sees itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_ip: Option<String>,
    /// Address at which the host reaches the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<String>,
    /// Free words of the user's.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// Why it is in `error` (or was stopped by other than its user).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The last step that failed and left it as it was, such as a pause; gone when one succeeds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// Where the time of its boot went.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootTimes>,
    /// When it was asked for.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When it could first be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub started_at: Option<Timestamp>,
    /// When it was last used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub last_active_at: Option<Timestamp>,
    /// When this record last changed.
    #[schema(value_type = String, format = DateTime)]
    pub last_updated: Timestamp,
    /// When `on_timeout` happens whether it is used or not; of sandboxes with such a deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires_at: Option<Timestamp>,
}

/// Milliseconds from the start of the create on the host until each step was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BootTimes {
    /// Disk, network and cgroup are there.
    pub prepared_ms: u32,
    /// The VMM answered.
    pub vmm_started_ms: u32,
    /// The guest kernel started its first program.
    pub kernel_ms: u32,
    /// The guest's init started the guest agent.
    pub init_ms: u32,
    /// The guest agent answered.
    pub envd_ms: u32,
}

/// Body of `POST /v1/sandboxes/{id}/exec`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// Program, looked up in PATH.
    pub cmd: String,
    /// Its arguments.
    #[serde(default)]
    pub args: Vec<String>,
    /// Environment added to the sandbox's.
    #[serde(default)]
    pub envs: BTreeMap<String, String>,
    /// Working directory; default: the user's home.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// User to run as; default: the template's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Seconds until it is killed; 0 means never; default 30 (in the background: 0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<i64>,
    /// Answer 202 at once with the pid and leave it running.
    #[serde(default)]
    pub background: bool,
    /// Name by which the process can be found again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

/// What a foreground exec answers (200).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExecResult {
    /// The sandbox.
    pub sandbox_id: String,
    /// The program that ran.
    pub cmd: String,
    /// Its standard output, in `encoding`.
    pub stdout: String,
    /// Its standard error, in `encoding`.
    pub stderr: String,
    /// Its exit code; -1 if a signal ended it.
    pub exit_code: i32,
    /// How it ended other than by exit, such as `signal: killed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Wall time as the server saw it, milliseconds.
    pub duration_ms: u64,
    /// `utf-8`, or `base64` for both streams if either is not UTF-8.
    pub encoding: String,
}

/// What a background exec answers (202).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BackgroundProcess {
    /// The sandbox.
    pub sandbox_id: String,
    /// The program that runs.
    pub cmd: String,
    /// Its process id in the guest.
    pub pid: u32,
    /// Its tag.
    pub tag: String,
}

/// What `GET /v1/sandboxes/{id}/processes` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProcessList {
    /// Processes that were started through the API and still run.
    pub processes: Vec<Process>,
}

/// A running process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Process {
    /// Process id in the guest.
    pub pid: u32,
    /// Its tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// The program.
    pub cmd: String,
    /// Its arguments.
    pub args: Vec<String>,
}

/// Body of `/files/read`, `/files/stream/read`, `/files/mkdir` and `/files/remove`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FilePath {
    /// Path in the guest; `~` is the user's home, a relative path starts there.
    pub path: String,
    /// User whose home and ownership count; default: the template's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Body of `/files/list`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ListFiles {
    /// Directory in the guest.
    pub path: String,
    /// How deep to go; default 1, the direct children.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<i64>,
    /// User whose home counts; default: the template's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// What `/files/list` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FileList {
    /// What was found, each directory before what it holds.
    pub entries: Vec<FileEntry>,
}

/// What `/files/mkdir` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FileEntryReply {
    /// The entry.
    pub entry: FileEntry,
}

/// A file, directory or link.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FileEntry {
    /// Last part of its path.
    pub name: String,
    /// Its path.
    pub path: String,
    /// `file`, `directory`, `symlink` or `unknown`; of a link: its target's.
    #[serde(rename = "type")]
    pub kind: String,
    /// Bytes.
    pub size: i64,
    /// Permission bits (0o644 is 420).
    pub mode: u32,
    /// As `ls -l` shows them.
    pub permissions: String,
    /// Owner's name.
    pub owner: String,
    /// Group's name.
    pub group: String,
    /// When it last changed.
    #[schema(value_type = String, format = DateTime)]
    pub modified_at: Timestamp,
    /// Where a link points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
}

/// What `GET /v1/sandboxes/{id}/metrics` answers: of a running sandbox what it uses now, of a paused one what it used last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Metrics {
    /// The sandbox.
    pub sandbox_id: String,
    /// Seconds since 1970 when they were read.
    pub timestamp_unix: i64,
    /// Virtual CPUs.
    pub cpu_count: u32,
    /// Share of all virtual CPUs in use, percent.
    pub cpu_pct: f64,
    /// Memory in use, bytes.
    pub mem_bytes: u64,
    /// Memory in all, bytes.
    pub mem_total_bytes: u64,
    /// Disk in use, bytes.
    pub disk_bytes: u64,
    /// Disk in all, bytes.
    pub disk_total_bytes: u64,
    /// What it used in the range that was asked for, oldest first: every 15 s in the last hour, every 5 min before.
    #[serde(default)]
    pub points: Vec<MetricsPoint>,
}

/// What a sandbox used at a moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MetricsPoint {
    /// Seconds since 1970.
    pub timestamp_unix: i64,
    /// Share of all virtual CPUs in use, percent.
    pub cpu_pct: f64,
    /// Memory in use, bytes.
    pub mem_bytes: u64,
    /// Disk in use, bytes.
    pub disk_bytes: u64,
}

/// Body of `POST /v1/sandboxes/{id}/fork`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkSandbox {
    /// How many copies, 1 to 100; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<i64>,
}

/// Body of `POST /v1/snapshots`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// The sandbox, running or paused; it goes on as it was.
    pub sandbox_id: String,
    /// Name of the new template; default `template-` and 8 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A template, as `GET /v1/templates` and `GET /v1/snapshots` list it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// Its name.
    pub name: String,
    /// `base`: an image that sandboxes boot from. `snapshot`: a frozen moment of a sandbox, from which others go on; their
    /// sizes are its own.
    #[serde(rename = "type")]
    pub kind: String,
    /// Virtual CPUs of a sandbox that asks for no other number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Memory, MiB, of a sandbox that asks for no other size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u32>,
    /// Disk, MiB, where sandboxes cannot choose it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<u32>,
    /// How many times its memory was frozen, of a `snapshot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u32>,
    /// Bytes on the host's disk.
    pub size_bytes: u64,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
}

/// Body of `POST /v1/api-keys`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateApiKey {
    /// What the key is for, in the user's words.
    pub name: String,
    /// Make it `e2b_` and 40 hexadecimal digits, as E2B's clients expect; default false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub e2b: bool,
}

/// An API key, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiKey {
    /// Its id, by which it is deleted.
    pub id: String,
    /// What it is for.
    pub name: String,
    /// The first eight characters of the secret.
    pub prefix: String,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When it was last used, to the minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub last_used_at: Option<Timestamp>,
}

/// What `POST /v1/api-keys` answers: the only time that the secret is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedApiKey {
    /// The secret: `wrn_` and 32 hexadecimal digits, or `e2b_` and 40. It cannot be shown again.
    pub key: String,
    /// The key's record.
    pub api_key: ApiKey,
}

/// What `GET /health` answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// `ok`.
    pub status: String,
    /// Version of the server.
    pub version: String,
}
