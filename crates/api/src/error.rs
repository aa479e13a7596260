//! The only place where failures become HTTP responses.
//!
//! | failure | status | code |
//! |---|---|---|
//! | invalid field, path, header or message | 400 | `invalid_request` |
//! | wrong content type | 415 | `invalid_request` |
//! | wrong method | 405 | `invalid_request` |
//! | missing or invalid key | 401 | `unauthorized` |
//! | key without the scope of the route | 403 | `forbidden` |
//! | no such sandbox, template, process, file, key or route | 404 | `not_found` |
//! | operation not allowed in the sandbox's status | 409 | `invalid_state` |
//! | concurrent change, existing path, or resource that cannot be deleted | 409 | `conflict` |
//! | resource to be created exists | 409 | `already_exists` |
//! | body or file exceeds the limit of this call | 413 | `too_large` |
//! | lack of memory, disk space or slots on the host or in the guest, or of buffers here | 503 | `resource_exhausted` |
//! | host or guest does not answer | 503 | `unavailable` |
//! | timeout, also of a client that takes no output | 504 | `timeout` |
//! | any other failure of the host | 502 | `agent_error` |
//! | database failure | 500 | `db_error` |
//! | bug in the control plane | 500 | `internal` |
//!
//! A response with status 503 has the header `Retry-After`.
//!
//! Internal causes are written to the server's log, not sent to the client.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use connectrpc::ErrorCode as RpcCode;
use http::{HeaderValue, StatusCode, header};
use wrenn_api_types::{ErrorBody, ErrorDetail, ErrorDetails};
use wrenn_control::{agent_client::AgentError, lifecycle::LifecycleError};
use wrenn_db::DbError;

/// Seconds after which a client may repeat a call for which the host lacked resources or did not
/// answer.
const RETRY_AFTER_SEC: &str = "5";

/// Machine-readable error code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    InvalidRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    InvalidState,
    Conflict,
    AlreadyExists,
    TooLarge,
    ResourceExhausted,
    Unavailable,
    Timeout,
    AgentError,
    DbError,
    Internal,
}

impl Code {
    /// Returns the code as it appears in the response body.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::InvalidState => "invalid_state",
            Self::Conflict => "conflict",
            Self::AlreadyExists => "already_exists",
            Self::TooLarge => "too_large",
            Self::ResourceExhausted => "resource_exhausted",
            Self::Unavailable => "unavailable",
            Self::Timeout => "timeout",
            Self::AgentError => "agent_error",
            Self::DbError => "db_error",
            Self::Internal => "internal",
        }
    }

    /// Returns the HTTP status that belongs to the code.
    pub(crate) const fn status(self) -> StatusCode {
        match self {
            Self::InvalidRequest => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::InvalidState | Self::Conflict | Self::AlreadyExists => StatusCode::CONFLICT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::ResourceExhausted | Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::AgentError => StatusCode::BAD_GATEWAY,
            Self::DbError | Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// Error as the client receives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) code: Code,
    pub(crate) message: String,
    /// Exit code that a shell reports for a command that was not started.
    pub(crate) exit_code: Option<i32>,
}

impl ApiError {
    /// Creates an error with the status that belongs to the code.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            status: code.status(),
            code,
            message: message.into(),
            exit_code: None,
        }
    }

    /// Creates an error for an invalid field.
    pub(crate) fn field(name: &str, why: impl std::fmt::Display) -> Self {
        Self::new(Code::InvalidRequest, format!("`{name}`: {why}"))
    }

    /// Replaces the status.
    pub(crate) fn with_status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// Creates an error for a body or file that exceeds its limit.
    pub(crate) fn too_large(what: &str, limit_bytes: usize) -> Self {
        let message = format!("{what} exceeds the limit of {limit_bytes} bytes");
        Self::new(Code::TooLarge, message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = ErrorBody {
            error: ErrorDetail {
                code: self.code.as_str().to_owned(),
                message: self.message,
                details: self.exit_code.map(|exit_code| ErrorDetails {
                    exit_code: Some(exit_code),
                    ..ErrorDetails::default()
                }),
            },
        };
        with_retry_after((self.status, Json(body)).into_response())
    }
}

/// Tells the client of a response that reports a shortage when another attempt makes sense.
pub(crate) fn with_retry_after(mut response: Response) -> Response {
    if response.status() == StatusCode::SERVICE_UNAVAILABLE {
        let after = HeaderValue::from_static(RETRY_AFTER_SEC);
        response.headers_mut().insert(header::RETRY_AFTER, after);
    }
    response
}

/// Maps an RPC code of the agent to an error code of the REST API.
const fn rpc_code(code: RpcCode) -> Code {
    match code {
        RpcCode::NotFound => Code::NotFound,
        RpcCode::InvalidArgument | RpcCode::OutOfRange => Code::InvalidRequest,
        RpcCode::FailedPrecondition => Code::InvalidState,
        RpcCode::Aborted => Code::Conflict,
        RpcCode::AlreadyExists => Code::AlreadyExists,
        RpcCode::ResourceExhausted => Code::ResourceExhausted,
        RpcCode::Unavailable => Code::Unavailable,
        // `DataLoss`: the client took no output for too long.
        RpcCode::DeadlineExceeded | RpcCode::DataLoss => Code::Timeout,
        // `Unauthenticated` and `PermissionDenied` concern the control plane and the agent, not the
        // user.
        _ => Code::AgentError,
    }
}

impl From<AgentError> for ApiError {
    fn from(error: AgentError) -> Self {
        if error.connection_lost {
            tracing::warn!(%error, "agent connection lost");
            return Self::new(Code::Unavailable, "the host agent does not answer");
        }
        match rpc_code(error.code) {
            // The agent's message is written for users: it names the damaged file or the part that
            // failed to start.
            Code::AgentError if error.code == RpcCode::Internal => {
                tracing::error!(%error, "agent call failed");
                Self::new(Code::AgentError, error.message)
            }
            Code::AgentError => {
                tracing::error!(%error, "agent call failed");
                Self::new(
                    Code::AgentError,
                    "unexpected failure of the host agent; see the log of the control plane",
                )
            }
            code => Self {
                exit_code: error.exit_code,
                ..Self::new(code, error.message)
            },
        }
    }
}

impl From<DbError> for ApiError {
    fn from(error: DbError) -> Self {
        Self::from(&error)
    }
}

impl From<&DbError> for ApiError {
    fn from(error: &DbError) -> Self {
        let cause = std::error::Error::source(error).map(ToString::to_string);
        tracing::error!(%error, cause, "database query failed");
        Self::new(
            Code::DbError,
            "failed to access the database; see the log of the control plane",
        )
    }
}

impl From<LifecycleError> for ApiError {
    fn from(error: LifecycleError) -> Self {
        Self::from(&error)
    }
}

impl From<&LifecycleError> for ApiError {
    fn from(error: &LifecycleError) -> Self {
        match error {
            LifecycleError::NotFound(_) => Self::new(Code::NotFound, error.to_string()),
            LifecycleError::Rejected(_) | LifecycleError::WrongStatus { .. } => {
                Self::new(Code::InvalidState, error.to_string())
            }
            LifecycleError::Busy(_) | LifecycleError::Known(_) => {
                Self::new(Code::Conflict, error.to_string())
            }
            LifecycleError::OtherHost { .. } => Self::new(Code::Unavailable, error.to_string()),
            LifecycleError::Agent(error) => error.clone().into(),
            LifecycleError::Db(error) => error.into(),
            LifecycleError::Shared(error) => Self::from(error.as_ref()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_agent(code: RpcCode, connection_lost: bool) -> (u16, &'static str, String) {
        let error = ApiError::from(AgentError {
            code,
            message: "the agent's message".to_owned(),
            connection_lost,
            exit_code: None,
        });
        (error.status.as_u16(), error.code.as_str(), error.message)
    }

    #[test]
    fn every_code_of_the_agent_has_its_status() {
        let told = "the agent's message";
        let hidden = "unexpected failure of the host agent; see the log of the control plane";
        let table = [
            (RpcCode::Canceled, 502, "agent_error", hidden),
            (RpcCode::Unknown, 502, "agent_error", hidden),
            (RpcCode::InvalidArgument, 400, "invalid_request", told),
            (RpcCode::DeadlineExceeded, 504, "timeout", told),
            (RpcCode::NotFound, 404, "not_found", told),
            (RpcCode::AlreadyExists, 409, "already_exists", told),
            (RpcCode::PermissionDenied, 502, "agent_error", hidden),
            (RpcCode::ResourceExhausted, 503, "resource_exhausted", told),
            (RpcCode::FailedPrecondition, 409, "invalid_state", told),
            (RpcCode::Aborted, 409, "conflict", told),
            (RpcCode::OutOfRange, 400, "invalid_request", told),
            (RpcCode::Unimplemented, 502, "agent_error", hidden),
            (RpcCode::Internal, 502, "agent_error", told),
            (RpcCode::Unavailable, 503, "unavailable", told),
            (RpcCode::DataLoss, 504, "timeout", told),
            (RpcCode::Unauthenticated, 502, "agent_error", hidden),
        ];
        for (code, status, word, message) in table {
            assert_eq!(
                from_agent(code, false),
                (status, word, message.to_owned()),
                "{code:?}"
            );
            let (status, word, message) = from_agent(code, true);
            assert_eq!((status, word), (503, "unavailable"), "{code:?}");
            assert!(!message.contains("agent's message"), "{code:?}");
        }
    }

    #[test]
    fn a_shortage_has_a_time_for_the_next_attempt() {
        let header = |code| {
            let response = ApiError::new(code, "full").into_response();
            response.headers().get(header::RETRY_AFTER).cloned()
        };
        for code in [Code::ResourceExhausted, Code::Unavailable] {
            assert_eq!(
                header(code),
                Some(HeaderValue::from_static("5")),
                "{code:?}"
            );
        }
        for code in [Code::InvalidRequest, Code::AgentError, Code::Timeout] {
            assert_eq!(header(code), None, "{code:?}");
        }
    }

    #[test]
    fn every_error_code_is_documented_in_the_contract() {
        let contract = include_str!("../../api-types/src/error.rs");
        for code in [
            Code::InvalidRequest,
            Code::Unauthorized,
            Code::Forbidden,
            Code::NotFound,
            Code::InvalidState,
            Code::Conflict,
            Code::AlreadyExists,
            Code::TooLarge,
            Code::ResourceExhausted,
            Code::Unavailable,
            Code::Timeout,
            Code::AgentError,
            Code::DbError,
            Code::Internal,
        ] {
            let word = format!("`{}`", code.as_str());
            assert!(contract.contains(&word), "{word}");
            assert!(code.status().is_client_error() || code.status().is_server_error());
        }
    }

    #[test]
    fn database_failure_reveals_no_detail() {
        let error = ApiError::from(DbError::Query {
            what: "read",
            source: sqlx::Error::Protocol("password=secret".into()),
        });
        assert_eq!(
            (error.status.as_u16(), error.code.as_str()),
            (500, "db_error")
        );
        assert!(!error.message.contains("secret"));
    }
}
