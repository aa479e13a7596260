//! Errors in the format of the E2B API: `{"code": 404, "message": "..."}`, where `code` repeats the
//! status.
//!
//! | failure | status |
//! |---|---|
//! | invalid field, path, header or query | 400 |
//! | missing or invalid key | 401 |
//! | key that may not use sandboxes | 403 |
//! | no such sandbox, template or route; a sandbox that has ended | 404 |
//! | status of the sandbox does not allow the call, or concurrent change | 409 |
//! | idempotency key of another request, or of one in progress | 409 |
//! | idempotency key of a request whose outcome is not known | 422 |
//! | bug, database failure or host failure | 500 |
//! | part of the contract that is not implemented | 501 |
//! | host or guest does not answer, or lacks free resources | 503 |
//! | timeout | 504 |
//!
//! Some errors have a code for programs: those of a create (`E2bError::of_create`), of an
//! idempotency key, and of a guest agent that does not answer.
//!
//! A response with status 503 has the header `Retry-After`. Clients repeat calls that failed with
//! 429, 502, 503 or 504, unless the header `Should-Retry` is `false`. The server sends `false`
//! where a repetition would create a second resource (`e2b::mark_retries`).

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use connectrpc::ErrorCode as RpcCode;
use http::StatusCode;
use serde::Serialize;
use utoipa::{IntoResponses, ToSchema};
use wrenn_control::{
    agent_client::AgentError,
    lifecycle::{LifecycleError, RequestError},
};
use wrenn_db::DbError;
use wrenn_model::SandboxStatus;

use crate::error::{ApiError, Code, with_retry_after};

/// Error code of a guest agent that does not answer.
const GUEST_UNRESPONSIVE: &str = "sandbox_snapshot_guest_agent_unresponsive";

/// Error code of a create for which the host lacks free resources now.
const CAPACITY_UNAVAILABLE: &str = "sandbox_capacity_unavailable";

/// Error code of a create that did not complete in time.
pub(super) const PLACEMENT_TIMEOUT: &str = "sandbox_placement_timeout";

/// Error code of a create from a snapshot that no host can restore.
const NO_COMPATIBLE_NODE: &str = "sandbox_no_compatible_node";

/// Error code of a create that failed on its host.
pub(super) const CREATE_FAILED: &str = "sandbox_create_failed";

/// Error code of a failure of the control plane.
const INTERNAL: &str = "internal_server_error";

/// Error body of the E2B API.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct E2bErrorBody {
    /// HTTP status.
    code: u16,
    /// Description of the failure.
    message: String,
    /// Machine-readable code, present for some failures only.
    #[serde(skip_serializing_if = "Option::is_none")]
    error_code: Option<&'static str>,
}

/// Errors that any call can return.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "documents, is never made")]
pub(super) enum E2bErrors {
    /// Invalid field, path, header or query.
    #[response(status = 400)]
    InvalidRequest(#[to_schema] E2bErrorBody),
    /// Missing or invalid API key.
    #[response(status = 401)]
    Unauthorized(#[to_schema] E2bErrorBody),
    /// The API key may not use sandboxes.
    #[response(status = 403)]
    Forbidden(#[to_schema] E2bErrorBody),
    /// Database failure, host failure or internal error.
    #[response(status = 500)]
    Server(#[to_schema] E2bErrorBody),
    /// The host or the guest does not answer, or lacks free resources.
    #[response(status = 503)]
    Unavailable(#[to_schema] E2bErrorBody),
}

/// Errors of a call that names a sandbox or a template.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "documents, is never made")]
pub(super) enum E2bNotFound {
    /// No such sandbox or template.
    #[response(status = 404)]
    NotFound(#[to_schema] E2bErrorBody),
}

/// Errors of a call that depends on the state of a resource.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "documents, is never made")]
pub(super) enum E2bConflict {
    /// The state of the resource does not allow the call.
    #[response(status = 409)]
    Conflict(#[to_schema] E2bErrorBody),
}

/// Error as a client of the E2B API receives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct E2bError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    error_code: Option<&'static str>,
    /// True if resources may be free later.
    is_exhausted: bool,
}

impl E2bError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            error_code: None,
            is_exhausted: false,
        }
    }

    /// Adds a machine-readable code.
    pub(super) fn with_code(mut self, error_code: &'static str) -> Self {
        self.error_code = Some(error_code);
        self
    }

    /// Converts the failure of a create at the host. Its code tells a program whether another
    /// attempt may succeed.
    pub(super) fn of_create(error: AgentError) -> Self {
        // The state of a sandbox that does not exist yet does not forbid anything: this host cannot
        // restore the snapshot.
        let is_incompatible = error.code == RpcCode::FailedPrecondition && !error.connection_lost;
        let mut told = Self::from(error);
        if is_incompatible {
            told.status = StatusCode::SERVICE_UNAVAILABLE;
            return told.with_code(NO_COMPATIBLE_NODE);
        }
        match told.status {
            StatusCode::SERVICE_UNAVAILABLE => told.with_code(CAPACITY_UNAVAILABLE),
            StatusCode::GATEWAY_TIMEOUT => told.with_code(PLACEMENT_TIMEOUT),
            StatusCode::INTERNAL_SERVER_ERROR => told.with_code(CREATE_FAILED),
            _ => told,
        }
    }

    /// Creates an error for an invalid field.
    pub(super) fn field(name: &str, why: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, format!("`{name}`: {why}"))
    }

    /// Creates an error for a part of the contract that this server does not implement.
    pub(super) fn unimplemented(what: &str) -> Self {
        Self::new(
            StatusCode::NOT_IMPLEMENTED,
            format!("{what}: not implemented by this server"),
        )
    }

    /// Creates an error for a sandbox that does not exist or has ended.
    pub(super) fn no_sandbox(id: impl std::fmt::Display) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            format!("the sandbox `{id}` was not found"),
        )
    }

    /// Creates an error for a template or snapshot that does not exist.
    pub(super) fn no_template(name: &str) -> Self {
        let shown: String = name.chars().take(80).collect();
        Self::new(
            StatusCode::NOT_FOUND,
            format!("the template `{shown}` was not found"),
        )
    }

    /// Creates an error for a guest agent that does not answer, although the client requires a
    /// healthy guest.
    pub(super) fn guest_unresponsive(id: impl std::fmt::Display) -> Self {
        let message = format!("the guest agent of sandbox `{id}` does not answer");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code(GUEST_UNRESPONSIVE)
    }
}

impl IntoResponse for E2bError {
    fn into_response(self) -> Response {
        with_retry_after((self.status, Json(E2bErrorBody::from(self))).into_response())
    }
}

impl From<E2bError> for E2bErrorBody {
    fn from(error: E2bError) -> Self {
        Self {
            code: error.status.as_u16(),
            message: error.message,
            error_code: error.error_code,
        }
    }
}

impl From<ApiError> for E2bError {
    fn from(error: ApiError) -> Self {
        let status = match error.code {
            // Clients take a 502 for a lost sandbox.
            Code::AgentError => StatusCode::INTERNAL_SERVER_ERROR,
            _ => error.status,
        };
        Self {
            is_exhausted: error.code == Code::ResourceExhausted,
            ..Self::new(status, error.message)
        }
    }
}

impl From<AgentError> for E2bError {
    fn from(error: AgentError) -> Self {
        ApiError::from(error).into()
    }
}

impl From<DbError> for E2bError {
    fn from(error: DbError) -> Self {
        Self::from(ApiError::from(error)).with_code(INTERNAL)
    }
}

impl From<LifecycleError> for E2bError {
    fn from(error: LifecycleError) -> Self {
        match &error {
            LifecycleError::NotFound(id) => Self::no_sandbox(id),
            LifecycleError::WrongStatus { id, status, .. } if has_ended(*status) => {
                Self::no_sandbox(id)
            }
            LifecycleError::Db(error) => Self::from(ApiError::from(error)).with_code(INTERNAL),
            LifecycleError::WrongStatus { id, status, .. } => Self::new(
                StatusCode::CONFLICT,
                format!("the sandbox `{id}` is {status}; the call is not allowed in this state"),
            ),
            _ => ApiError::from(error).into(),
        }
    }
}

impl From<RequestError> for E2bError {
    fn from(error: RequestError) -> Self {
        let (status, error_code) = match error {
            RequestError::Db(error) => return error.into(),
            RequestError::Other => (StatusCode::CONFLICT, "idempotency_request_mismatch"),
            RequestError::UnderWay => (StatusCode::CONFLICT, "idempotency_in_progress"),
            RequestError::OutcomeUnknown(_) => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency_outcome_unknown",
            ),
        };
        Self::new(status, error.to_string()).with_code(error_code)
    }
}

/// True if the sandbox is no longer visible to clients of the E2B API.
pub(super) const fn has_ended(status: SandboxStatus) -> bool {
    matches!(
        status,
        SandboxStatus::Stopping | SandboxStatus::Stopped | SandboxStatus::Error
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::*;

    #[test]
    fn ended_sandbox_is_not_found_and_other_wrong_statuses_conflict() {
        for status in SandboxStatus::ALL {
            let error = E2bError::from(LifecycleError::WrongStatus {
                id: "sb-1".parse().unwrap(),
                status,
                reason: String::new(),
                wanted: "running",
            });
            let wanted = if has_ended(status) { 404 } else { 409 };
            assert_eq!(error.status.as_u16(), wanted, "{status}");
        }
    }

    #[test]
    fn failed_create_has_an_error_code() {
        for (code, connection_lost, status, error_code) in [
            (
                RpcCode::ResourceExhausted,
                false,
                503,
                Some(CAPACITY_UNAVAILABLE),
            ),
            (RpcCode::Unavailable, true, 503, Some(CAPACITY_UNAVAILABLE)),
            (
                RpcCode::FailedPrecondition,
                true,
                503,
                Some(CAPACITY_UNAVAILABLE),
            ),
            (
                RpcCode::DeadlineExceeded,
                false,
                504,
                Some(PLACEMENT_TIMEOUT),
            ),
            (
                RpcCode::FailedPrecondition,
                false,
                503,
                Some(NO_COMPATIBLE_NODE),
            ),
            (RpcCode::Internal, false, 500, Some(CREATE_FAILED)),
            (RpcCode::Unknown, false, 500, Some(CREATE_FAILED)),
            (RpcCode::InvalidArgument, false, 400, None),
            (RpcCode::Aborted, false, 409, None),
        ] {
            let error = E2bError::of_create(AgentError {
                code,
                message: String::new(),
                connection_lost,
                exit_code: None,
            });
            assert_eq!(error.status.as_u16(), status, "{code:?}");
            assert_eq!(error.error_code, error_code, "{code:?}");
        }
    }

    #[test]
    fn host_failure_is_not_reported_as_a_lost_sandbox() {
        let error = E2bError::from(AgentError {
            code: connectrpc::ErrorCode::Internal,
            message: "the header is damaged".to_owned(),
            connection_lost: false,
            exit_code: None,
        });
        assert_eq!(error.status.as_u16(), 500);
        assert_eq!(error.message, "the header is damaged");
    }
}
