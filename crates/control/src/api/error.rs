//! The one place where failures become HTTP.
//!
//! | what | status | code |
//! |---|---|---|
//! | a field, path, header or message is wrong | 400 (415 wrong content type, 405 wrong method) | `invalid_request` |
//! | no key, or a wrong one | 401 | `unauthorized` |
//! | no such sandbox, template, process, file, key or route | 404 | `not_found` |
//! | the sandbox's status does not allow it | 409 | `invalid_state` |
//! | others are changing it, or it cannot be given up | 409 | `conflict` |
//! | what is to be made exists | 409 | `already_exists` |
//! | body, file or output is larger than this call takes | 413 | `too_large` |
//! | the host or the guest has no room for it | 503 | `resource_exhausted` |
//! | the host or the guest does not answer | 503 | `unavailable` |
//! | it took too long | 504 | `timeout` |
//! | the host failed otherwise | 502 | `agent_error` |
//! | the database failed | 500 | `db_error` |
//! | a bug here | 500 | `internal` |
//!
//! Causes inside the server go to its log, not to the client.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use connectrpc::ErrorCode as RpcCode;
use http::StatusCode;
use wrenn_proto::rest::{ErrorBody, ErrorDetail};

use crate::{agent_client::AgentError, db::DbError, lifecycle::LifecycleError};

/// The word for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    InvalidRequest,
    Unauthorized,
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
    /// As it stands in the body.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::Unauthorized => "unauthorized",
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

    /// The status that goes with it.
    pub(crate) const fn status(self) -> StatusCode {
        match self {
            Self::InvalidRequest => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
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

/// A failure as the client sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) code: Code,
    pub(crate) message: String,
}

impl ApiError {
    /// With the code's own status.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            status: code.status(),
            code,
            message: message.into(),
        }
    }

    /// A field is wrong.
    pub(crate) fn field(name: &str, why: impl std::fmt::Display) -> Self {
        Self::new(Code::InvalidRequest, format!("`{name}`: {why}"))
    }

    /// With another status.
    pub(crate) fn with_status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// The body is larger than allowed.
    pub(crate) fn too_large(what: &str, limit_bytes: usize) -> Self {
        let message = format!("{what} is larger than {limit_bytes} bytes");
        Self::new(Code::TooLarge, message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = ErrorBody {
            error: ErrorDetail {
                code: self.code.as_str().to_owned(),
                message: self.message,
            },
        };
        (self.status, Json(body)).into_response()
    }
}

/// What an RPC code of the agent is to a client of ours.
const fn rpc_code(code: RpcCode) -> Code {
    match code {
        RpcCode::NotFound => Code::NotFound,
        RpcCode::InvalidArgument | RpcCode::OutOfRange => Code::InvalidRequest,
        RpcCode::FailedPrecondition => Code::InvalidState,
        RpcCode::Aborted => Code::Conflict,
        RpcCode::AlreadyExists => Code::AlreadyExists,
        RpcCode::ResourceExhausted => Code::ResourceExhausted,
        RpcCode::Unavailable => Code::Unavailable,
        RpcCode::DeadlineExceeded => Code::Timeout,
        // `Unauthenticated` and `PermissionDenied` are between us and the agent, not the user's.
        _ => Code::AgentError,
    }
}

impl From<AgentError> for ApiError {
    fn from(error: AgentError) -> Self {
        if error.connection_lost {
            tracing::warn!(%error, "lost a call to the host agent");
            return Self::new(Code::Unavailable, "the host does not answer");
        }
        match rpc_code(error.code) {
            // The agent's own words are written for users: which file is damaged, what could not start.
            Code::AgentError if error.code == RpcCode::Internal => {
                tracing::error!(%error, "the host agent failed");
                Self::new(Code::AgentError, error.message)
            }
            Code::AgentError => {
                tracing::error!(%error, "the host agent failed");
                Self::new(
                    Code::AgentError,
                    "the host failed to do this; its log says why",
                )
            }
            code => Self::new(code, error.message),
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
        tracing::error!(%error, cause, "the database failed");
        Self::new(
            Code::DbError,
            "the database failed; the server's log says why",
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
            LifecycleError::Refused(_) | LifecycleError::WrongStatus { .. } => {
                Self::new(Code::InvalidState, error.to_string())
            }
            LifecycleError::Busy(_) => Self::new(Code::Conflict, error.to_string()),
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
            message: "the agent's words".to_owned(),
            connection_lost,
        });
        (error.status.as_u16(), error.code.as_str(), error.message)
    }

    #[test]
    fn every_code_of_the_agent_has_its_status() {
        let told = "the agent's words";
        let hidden = "the host failed to do this; its log says why";
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
            (RpcCode::DataLoss, 502, "agent_error", hidden),
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
            assert!(!message.contains("agent's words"), "{code:?}");
        }
    }

    #[test]
    fn every_word_is_documented_in_the_contract() {
        let contract = include_str!("../../../proto/src/rest.rs");
        for code in [
            Code::InvalidRequest,
            Code::Unauthorized,
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
    fn a_database_failure_tells_nothing_of_the_database() {
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
