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
}
