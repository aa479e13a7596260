//! Commands and processes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

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
    /// Time until the program and all its descendants are killed, in seconds; 0 means never;
    /// default 30 (0 with `background`).
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
    /// Present if output beyond the limit was dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truncated: Option<Truncated>,
}

/// Output of a command beyond the limit, which was dropped. The result has the first bytes of each
/// stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Truncated {
    /// Limit that was reached.
    #[serde(default)]
    pub limit: TruncatedBy,
    /// Size of this limit, in bytes.
    pub limit_bytes: u64,
    /// Number of bytes of standard output that were dropped.
    pub stdout_dropped_bytes: u64,
    /// Number of bytes of standard error that were dropped.
    pub stderr_dropped_bytes: u64,
}

/// Limit of the output of a command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TruncatedBy {
    /// Maximum output that is returned per stream.
    #[default]
    Exec,
    /// Maximum size of all bodies that the server holds in memory.
    Buffers,
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
