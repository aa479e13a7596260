//! Failures that the guest agent reports by HTTP status, converted to RPC errors.

use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};
use http::{Response, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use serde::Deserialize;

use crate::{
    client::{MAX_SMALL_ANSWER_BYTES, names_user},
    deadline::within,
};

const DEADLINE: Duration = Duration::from_secs(10);

/// Maximum length of an error message, in characters. The rest is cut off.
const MAX_MESSAGE_CHARS: usize = 2000;

/// Body of the guest agent's error responses.
#[derive(Deserialize)]
struct ErrorBody {
    message: String,
}

/// Returns a successful response, or the error that its status and body describe. `user` is the
/// user that the request was made for.
pub(crate) async fn check(
    answer: Response<Incoming>,
    user: &str,
) -> Result<Response<Incoming>, ConnectError> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let body = Limited::new(answer.into_body(), MAX_SMALL_ANSWER_BYTES);
    let body = within(DEADLINE, async { Ok(body.collect().await.ok()) }).await?;
    let body = body.map(|body| body.to_bytes()).unwrap_or_default();
    let message = serde_json::from_slice(&body).map_or_else(
        |_| format!("the guest agent responded with {status}"),
        |body: ErrorBody| plain(&body.message),
    );
    let is_about_user = !user.is_empty() || names_user(&message);
    Err(ConnectError::new(code_of(status, is_about_user), message))
}

/// Returns the guest's message in a form that is safe to store and display. The guest is untrusted:
/// it must not inject control characters into a log, or text that a database rejects.
fn plain(text: &str) -> String {
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    text.chars()
        .take(MAX_MESSAGE_CHARS)
        .map(printable)
        .collect()
}

/// Returns the RPC code for an HTTP status.
fn code_of(status: StatusCode, is_about_user: bool) -> ErrorCode {
    match status {
        StatusCode::BAD_REQUEST => ErrorCode::InvalidArgument,
        // The agent's own token is correct, so the unknown part is the user.
        StatusCode::UNAUTHORIZED if is_about_user => ErrorCode::InvalidArgument,
        StatusCode::UNAUTHORIZED => ErrorCode::Internal,
        StatusCode::FORBIDDEN => ErrorCode::PermissionDenied,
        StatusCode::NOT_FOUND => ErrorCode::NotFound,
        StatusCode::CONFLICT => ErrorCode::AlreadyExists,
        StatusCode::PAYLOAD_TOO_LARGE | StatusCode::INSUFFICIENT_STORAGE => {
            ErrorCode::ResourceExhausted
        }
        StatusCode::SERVICE_UNAVAILABLE => ErrorCode::Unavailable,
        _ => ErrorCode::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_message_is_shortened_and_has_no_control_characters() {
        assert_eq!(plain("no\0t\u{1b}[2J so\n"), "no t [2J so ");
        assert_eq!(plain(&"x".repeat(9000)).len(), MAX_MESSAGE_CHARS);
    }

    #[test]
    fn every_status_that_the_guest_agent_uses_has_its_code() {
        let table = [
            (400, ErrorCode::InvalidArgument),
            (401, ErrorCode::InvalidArgument),
            (403, ErrorCode::PermissionDenied),
            (404, ErrorCode::NotFound),
            (409, ErrorCode::AlreadyExists),
            (413, ErrorCode::ResourceExhausted),
            (500, ErrorCode::Internal),
            (503, ErrorCode::Unavailable),
            (507, ErrorCode::ResourceExhausted),
        ];
        for (status, code) in table {
            let status = StatusCode::from_u16(status).expect("a status");
            assert_eq!(code_of(status, true), code, "{status}");
        }
        assert_eq!(
            code_of(StatusCode::UNAUTHORIZED, false),
            ErrorCode::Internal
        );
    }
}
