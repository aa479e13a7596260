//! Error responses.

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
    /// Error code for programs: `invalid_request`, `unauthorized`, `forbidden`, `not_found`, `invalid_state`,
    /// `conflict`, `already_exists`, `too_large`, `resource_exhausted`, `agent_error`,
    /// `unavailable`, `timeout`, `db_error`, `internal`.
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
    /// not exist, 126 if the program cannot be executed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
}
