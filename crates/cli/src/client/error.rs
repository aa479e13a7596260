//! What can go wrong between a verb and the server, in words that say what to do.

use std::{error::Error, io, path::PathBuf};

use reqwest::{StatusCode, Url};
use wrenn_proto::rest::ErrorBody;

/// How much of an answer that is not ours is shown.
const SHOWN_CHARS: usize = 200;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// The URL of the server cannot be used.
    #[error("the API URL `{url}` cannot be used: {why}")]
    BadUrl {
        /// As it was set.
        url: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There is no key.
    #[error(
        "no API key: set WRENN_API_KEY, or run as the user who runs `wrenn up`, which keeps one in {}",
        path.display()
    )]
    NoKey {
        /// Where a key was looked for.
        path: PathBuf,
        /// Why it was not found.
        source: io::Error,
    },
    /// The HTTP client cannot be made.
    #[error("cannot start the HTTP client")]
    Setup(#[source] reqwest::Error),
    /// No connection.
    #[error(
        "cannot reach the server at {url}: {cause}; start it with `wrenn up`, or set WRENN_API_URL"
    )]
    Unreachable {
        /// Where it was looked for.
        url: String,
        /// What the network said.
        cause: String,
    },
    /// No answer in time.
    #[error("the server at {url} did not answer in time")]
    TimedOut {
        /// The server.
        url: String,
    },
    /// The connection broke during a call.
    #[error("the connection to {url} broke: {cause}")]
    Broken {
        /// The server.
        url: String,
        /// What the network said.
        cause: String,
    },
    /// The server does not know the key.
    #[error("the server refused the API key: {message}; set WRENN_API_KEY to a key it knows")]
    Unauthorized {
        /// The server's sentence.
        message: String,
    },
    /// The server refused, with its own words.
    #[error("{message}")]
    Refused {
        /// Status of the answer.
        status: StatusCode,
        /// One word for programs.
        code: String,
        /// The server's sentence.
        message: String,
    },
    /// Something that is not Wrenn answered.
    #[error("{status} from what may not be a Wrenn server: {body}")]
    Foreign {
        /// Status of the answer.
        status: StatusCode,
        /// How its body begins.
        body: String,
    },
    /// The answer is not what the API promises.
    #[error("the server's answer cannot be read (is it of another version?)")]
    Answer(#[source] serde_json::Error),
    /// A stream ended before its end was told.
    #[error("the stream from the sandbox ended early: {0}")]
    Stream(String),
    /// A transfer made no progress.
    #[error("no byte moved for {seconds} s; the server or the sandbox hangs")]
    Stalled {
        /// How long.
        seconds: u64,
    },
}

impl ClientError {
    /// What the HTTP client said, sorted by what the user can do.
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

    /// An answer that is not a success.
    pub(super) fn refused(status: StatusCode, body: &[u8]) -> Self {
        match serde_json::from_slice::<ErrorBody>(body) {
            Ok(ErrorBody { error }) if status == StatusCode::UNAUTHORIZED => Self::Unauthorized {
                message: error.message,
            },
            Ok(ErrorBody { error }) => Self::Refused {
                status,
                code: error.code,
                message: error.message,
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

    /// Whether the server says that what was asked about does not exist.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { status, .. } if *status == StatusCode::NOT_FOUND)
    }
}

/// The last cause: the outer ones of the HTTP client only repeat the URL.
fn innermost(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
