//! Error response: `{"code": <HTTP status>, "message": "…"}`.

use std::io;

use axum::{
    Json,
    response::{IntoResponse as _, Response},
};
use http::StatusCode;

use crate::paths::is_link_cycle;

/// Failure of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpError {
    /// HTTP status.
    pub status: StatusCode,
    /// Message for the user.
    pub message: String,
}

impl HttpError {
    /// Creates a failure with a message.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }

    /// Creates a failure with status 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// Creates a failure with status 401.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, message)
    }

    /// Converts a file system error to a failure.
    #[must_use]
    pub fn of_file(path: &std::path::Path, error: &io::Error) -> Self {
        let path = path.display();
        match error.kind() {
            io::ErrorKind::NotFound => Self::new(
                StatusCode::NOT_FOUND,
                format!("path '{path}' does not exist"),
            ),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                format!("not enough disk space to write '{path}'"),
            ),
            io::ErrorKind::IsADirectory => {
                Self::bad_request(format!("path '{path}' is a directory"))
            }
            // The file itself does not allow the operation, even to root, for example a program
            // that is being executed or a file of the kernel.
            io::ErrorKind::NotADirectory
            | io::ErrorKind::InvalidFilename
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::ExecutableFileBusy
            | io::ErrorKind::ResourceBusy
            | io::ErrorKind::FileTooLarge
            | io::ErrorKind::ReadOnlyFilesystem => {
                Self::bad_request(format!("path '{path}': {error}"))
            }
            _ if is_link_cycle(error) => Self::bad_request(format!("path '{path}': {error}")),
            _ => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("path '{path}': {error}"),
            ),
        }
    }
}

impl axum::response::IntoResponse for HttpError {
    fn into_response(self) -> Response {
        error_response(self.status, &self.message)
    }
}

/// Creates the response of a failure.
#[must_use]
pub fn error_response(status: StatusCode, message: &str) -> Response {
    let body = serde_json::json!({ "code": status.as_u16(), "message": message });
    (status, Json(body)).into_response()
}

/// Creates the response of a unary call that fails before it reaches its service:
/// `{"code": "<Connect's code>", "message": "…"}`.
#[must_use]
pub fn connect_error(status: StatusCode, code: &str, message: &str) -> Response {
    let body = serde_json::json!({ "code": code, "message": message });
    (status, Json(body)).into_response()
}
