//! Error responses.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Truncated;

/// Body of every error response.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// Details of the error.
    pub error: ErrorDetail,
}

/// Details of an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// Error code for programs: `invalid_request`, `unauthorized`, `forbidden`, `not_found`,
    /// `invalid_state`, `conflict`, `already_exists`, `too_large`, `resource_exhausted`,
    /// `agent_error`, `unavailable`, `timeout`, `db_error`, `internal`.
    pub code: String,
    /// Human-readable message. Names the affected field, file or resource, if there is one.
    pub message: String,
    /// Further facts about the error, if there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<ErrorDetails>,
}

/// Further facts about an error. All fields are optional.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetails {
    /// Exit code that a shell reports for a command that was not started: 127 if its program does
    /// not exist, 126 if the program cannot be executed. -1 for a command whose timeout expired.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Standard output of a command whose timeout expired.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout: Option<String>,
    /// Standard error of a command whose timeout expired.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr: Option<String>,
    /// Encoding of `stdout` and `stderr`: `utf-8`, or `base64` if either is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<String>,
    /// Run time of a command whose timeout expired, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u64>,
    /// Output that was dropped, if any was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truncated: Option<Truncated>,
}
