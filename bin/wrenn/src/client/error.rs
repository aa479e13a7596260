//! Errors of calls to the server. Each message states how to fix the problem.

use std::{error::Error, io, path::PathBuf};

use reqwest::{StatusCode, Url};
use wrenn_api_types::ErrorBody;

/// Number of characters shown of an unrecognized response.
const SHOWN_CHARS: usize = 200;

/// Errors of a call.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// The URL of the server is invalid.
    #[error("invalid API URL `{url}`: {why}")]
    BadUrl {
        /// The configured URL.
        url: String,
        /// Description of the problem.
        why: &'static str,
    },
    /// No API key is configured.
    #[error(
        "no API key: set WRENN_API_KEY, or run as the user that runs `wrenn up` and can read {}",
        path.display()
    )]
    NoKey {
        /// Path of the key file.
        path: PathBuf,
        /// Cause of the failure.
        source: io::Error,
    },
    /// The HTTP client cannot be created.
    #[error("failed to create the HTTP client")]
    Setup(#[source] reqwest::Error),
    /// The connection failed.
    #[error(
        "failed to connect to the server at {url}: {cause}; start it with `wrenn up`, or set WRENN_API_URL"
    )]
    Unreachable {
        /// URL of the server.
        url: String,
        /// Cause of the failure.
        cause: String,
    },
    /// The deadline passed without a response.
    #[error("the server at {url} did not respond in time")]
    TimedOut {
        /// URL of the server.
        url: String,
    },
    /// The connection failed during a call.
    #[error("the connection to {url} failed: {cause}")]
    Broken {
        /// URL of the server.
        url: String,
        /// Cause of the failure.
        cause: String,
    },
    /// The server does not know the API key.
    #[error("the server rejected the API key: {message}; set WRENN_API_KEY to a valid key")]
    Unauthorized {
        /// Message of the server.
        message: String,
    },
    /// The server rejected the request; its message is shown.
    #[error("{message}")]
    Rejected {
        /// Status of the response.
        status: StatusCode,
        /// Error code for programs.
        code: String,
        /// Message of the server.
        message: String,
        /// Exit code that a shell reports for the command, if its program is the reason.
        exit_code: Option<i32>,
    },
    /// The command of a stream was not started, because its program cannot be executed.
    #[error("{message}")]
    NotExecuted {
        /// Message of the server.
        message: String,
        /// Exit code that a shell reports for the command.
        exit_code: i32,
    },
    /// The response does not come from a Wrenn server.
    #[error("unexpected response with status {status}, possibly not from a Wrenn server: {body}")]
    Foreign {
        /// Status of the response.
        status: StatusCode,
        /// Beginning of its body.
        body: String,
    },
    /// The response does not match the API.
    #[error("failed to parse the server's response (does its version match this client?)")]
    Answer(#[source] serde_json::Error),
    /// A stream ended before its final message.
    #[error("the stream from the sandbox failed: {0}")]
    Stream(String),
    /// A transfer made no progress.
    #[error("no data transferred for {seconds} s; the server or the sandbox does not respond")]
    Stalled {
        /// Time without progress, in seconds.
        seconds: u64,
    },
}

impl ClientError {
    /// Classifies an error of the HTTP client by the action that the user can take.
    pub(super) fn transport(base: &Url, error: reqwest::Error) -> Self {
        let url = base.as_str().trim_end_matches('/').to_owned();
        if error.is_connect() {
            return Self::Unreachable {
                url,
                cause: innermost(&error),
            };
        }
        if error.is_timeout() {
            return Self::TimedOut { url };
        }
        Self::Broken {
            url,
            cause: innermost(&error),
        }
    }

    /// Converts a response that is not a success.
    pub(super) fn rejected(status: StatusCode, body: &[u8]) -> Self {
        match serde_json::from_slice::<ErrorBody>(body) {
            Ok(ErrorBody { error }) if status == StatusCode::UNAUTHORIZED => Self::Unauthorized {
                message: error.message,
            },
            Ok(ErrorBody { error }) => Self::Rejected {
                status,
                code: error.code,
                message: error.message,
                exit_code: error.details.and_then(|details| details.exit_code),
            },
            Err(_) => Self::Foreign {
                status,
                body: String::from_utf8_lossy(body)
                    .chars()
                    .map(|c| if c.is_control() { ' ' } else { c })
                    .take(SHOWN_CHARS)
                    .collect(),
            },
        }
    }

    /// Returns the exit code that a shell reports for a command that was not started, if its
    /// program is the reason.
    pub(crate) fn exit_code(&self) -> Option<i32> {
        match self {
            Self::Rejected { exit_code, .. } => *exit_code,
            Self::NotExecuted { exit_code, .. } => Some(*exit_code),
            _ => None,
        }
    }

    /// True if the server reports that the requested object does not exist.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Rejected { status, .. } if *status == StatusCode::NOT_FOUND)
    }
}

/// Returns the innermost cause: the outer ones of the HTTP client only repeat the URL.
fn innermost(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
