//! Commands that run to their end, or in the background.

use std::time::{Duration, Instant};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use http::StatusCode;
use wrenn_api_types::{
    BackgroundProcess, ErrorBody, ErrorDetail, ErrorDetails, ExecRequest, ExecResult, Truncated,
    TruncatedBy,
};
use wrenn_control::guest::{Guest, GuestEvents, time_limit};
use wrenn_envd_client::{Exec, ExecOutput};
use wrenn_model::{SandboxId, limits::MAX_EXEC_OUTPUT_BYTES};
use wrenn_proto::rpc::process::{self as rpc_process, process_event::Event};

use super::{process, utf8::unfinished};
use crate::{
    app::AppState,
    buffers,
    error::{ApiError, Code},
    extract::{ApiJson, SandboxPath},
    openapi::{BodyErrors, CommonErrors, HostErrors, SandboxErrors},
    validate,
};

/// Maximum time until a background process reports its process id.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Room for output without which no command is started, in bytes.
const MIN_OUTPUT_BYTES: usize = 64 * 1024;

/// Runs a command.
///
/// Without `background`, the response is sent when the command has ended (200). With `background`,
/// it is sent when the process has started (202). A sandbox that is still booting is waited for.
///
/// The command ends when its own process ends, even if processes that it has started keep its
/// output open; these live on, and their later output is dropped. When the timeout expires, all
/// descendants of the command are killed, and the response is 504 `timeout` with the output so far
/// in `details`. The first 16 MiB of each stream are returned, and `truncated` is set if there was
/// more; `exec/stream` has no limit. If the server's buffers are used up, the command is not
/// started (503), or further output is dropped, which `truncated` reports. A program that does not
/// exist or cannot be executed is an error with `details.exit_code` 127 or 126.
#[utoipa::path(
    post, path = "/{id}/exec", tag = "processes", operation_id = "exec", request_body = ExecRequest,
    params(("id" = String, Path, description = "Sandbox id.")),
    responses(
        (status = 200, description = "The command ended.", body = ExecResult),
        (status = 202, description = "The process runs in the background.", body = BackgroundProcess),
        CommonErrors, BodyErrors, SandboxErrors, HostErrors
    )
)]
pub(super) async fn exec(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ApiJson(request): ApiJson<ExecRequest>,
) -> Result<Response, ApiError> {
    let timeout_sec = validate::check_exec(&request)?;
    let (guest, _used) = app.ready(&id).await?;
    if request.background {
        let reply = background(&guest, &id, request, timeout_sec).await?;
        return Ok((StatusCode::ACCEPTED, Json(reply)).into_response());
    }
    let mut reserved = app.buffers.reserve(MIN_OUTPUT_BYTES)?;
    let begun = Instant::now();
    let cmd = request.cmd.clone();
    let exec = Exec {
        process: process::config(request.cmd, request.args, request.envs, request.cwd),
        user: request.user.unwrap_or_default(),
        time_limit: time_limit(timeout_sec),
        tag: request.tag,
    };
    let done = guest.exec(exec, &mut reserved).await?;
    let budget_bytes = app.buffers.limit_bytes();
    let is_timed_out = done.is_timed_out;
    let result = result(&id, cmd, done, begun.elapsed(), budget_bytes);
    if is_timed_out {
        return buffers::json(Code::Timeout.status(), &timed_out(result), reserved);
    }
    buffers::json(StatusCode::OK, &result, reserved)
}

/// Returns the error of a command that was killed at the end of its time, with its output.
fn timed_out(result: ExecResult) -> ErrorBody {
    let code = Code::Timeout.as_str().to_owned();
    let message = format!("`{}` {}", result.cmd, result.error.unwrap_or_default());
    let details = ErrorDetails {
        exit_code: Some(result.exit_code),
        stdout: Some(result.stdout),
        stderr: Some(result.stderr),
        encoding: Some(result.encoding),
        duration_ms: Some(result.duration_ms),
        truncated: result.truncated,
    };
    ErrorBody {
        error: ErrorDetail {
            code,
            message,
            details: Some(details),
        },
    }
}

fn result(
    id: &SandboxId,
    cmd: String,
    mut done: ExecOutput,
    took: Duration,
    budget_bytes: usize,
) -> ExecResult {
    end_at_character(&mut done.stdout, &mut done.stdout_dropped_bytes);
    end_at_character(&mut done.stderr, &mut done.stderr_dropped_bytes);
    let is_truncated = done.stdout_dropped_bytes > 0 || done.stderr_dropped_bytes > 0;
    let (limit, limit_bytes) = if done.is_over_budget {
        (TruncatedBy::Buffers, budget_bytes)
    } else {
        (TruncatedBy::Exec, MAX_EXEC_OUTPUT_BYTES)
    };
    let (stdout, stderr, encoding) = encode(done.stdout, done.stderr);
    ExecResult {
        sandbox_id: id.to_string(),
        cmd,
        stdout,
        stderr,
        exit_code: done.exit_code,
        error: (!done.error.is_empty()).then_some(done.error),
        duration_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        encoding: encoding.to_owned(),
        truncated: is_truncated.then_some(Truncated {
            limit,
            limit_bytes: limit_bytes as u64,
            stdout_dropped_bytes: done.stdout_dropped_bytes,
            stderr_dropped_bytes: done.stderr_dropped_bytes,
        }),
    }
}

/// Removes a character that the limit has cut, so that text stays text.
fn end_at_character(stream: &mut Vec<u8>, dropped_bytes: &mut u64) {
    if *dropped_bytes > 0 {
        let cut = unfinished(stream);
        stream.truncate(stream.len() - cut);
        *dropped_bytes += cut as u64;
    }
}

/// Encodes both streams as text, or both as base64 if either is not UTF-8.
fn encode(stdout: Vec<u8>, stderr: Vec<u8>) -> (String, String, &'static str) {
    let texts = String::from_utf8(stdout)
        .map_err(|e| (e.into_bytes(), None))
        .and_then(|out| match String::from_utf8(stderr.clone()) {
            Ok(err) => Ok((out, err)),
            Err(e) => Err((out.into_bytes(), Some(e.into_bytes()))),
        });
    match texts {
        Ok((out, err)) => (out, err, "utf-8"),
        Err((out, err)) => (
            BASE64.encode(out),
            BASE64.encode(err.unwrap_or(stderr)),
            "base64",
        ),
    }
}

/// Starts a process and leaves it running.
async fn background(
    guest: &Guest,
    id: &SandboxId,
    request: ExecRequest,
    timeout_sec: u32,
) -> Result<BackgroundProcess, ApiError> {
    let tag = request.tag.unwrap_or_else(|| process::new_tag("proc"));
    let cmd = request.cmd.clone();
    let start = rpc_process::StartRequest {
        process: process::config(request.cmd, request.args, request.envs, request.cwd).into(),
        tag: Some(tag.clone()),
        stdin: Some(false),
        ..Default::default()
    };
    let user = request.user.unwrap_or_default();
    let started = async {
        // The output from the first byte on is kept for the client that opens the process's stream.
        let events = guest.start(start, &user, timeout_sec, true).await?;
        started(events).await
    };
    let pid = tokio::time::timeout(START_TIMEOUT, started)
        .await
        .unwrap_or_else(|_| {
            Err(ApiError::new(
                Code::Timeout,
                "timed out waiting for the process to start",
            ))
        })?;
    Ok(BackgroundProcess {
        sandbox_id: id.to_string(),
        cmd,
        pid,
        tag,
    })
}

/// Reads events up to the start of the process. Dropping the stream does not end the process.
async fn started(mut events: GuestEvents) -> Result<u32, ApiError> {
    while let Some(event) = events.next().await? {
        match event {
            Event::Start(start) => return Ok(start.pid),
            Event::End(_) => break,
            Event::Data(_) | Event::Lost(_) | Event::Keepalive(_) => {}
        }
    }
    Err(ApiError::new(
        Code::AgentError,
        "the process ended before it reported its start",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_beyond_the_limit_is_marked_and_text_stays_text() {
        let id: SandboxId = "sb-00000000".parse().expect("an id");
        let of = |stdout: &[u8], dropped| {
            let done = ExecOutput {
                stdout: stdout.to_vec(),
                stdout_dropped_bytes: dropped,
                exit_code: 3,
                ..ExecOutput::default()
            };
            result(&id, "cmd".to_owned(), done, Duration::ZERO, 7)
        };
        let whole = of("aü".as_bytes(), 0);
        assert_eq!((whole.stdout.as_str(), whole.truncated), ("aü", None));
        let cut = of(b"a\xc3", 7);
        assert_eq!((cut.stdout.as_str(), cut.exit_code), ("a", 3));
        let truncated = Truncated {
            limit: TruncatedBy::Exec,
            limit_bytes: 16 * 1024 * 1024,
            stdout_dropped_bytes: 8,
            stderr_dropped_bytes: 0,
        };
        assert_eq!(cut.truncated, Some(truncated));
        let over_budget = ExecOutput {
            stderr_dropped_bytes: 1,
            is_over_budget: true,
            ..ExecOutput::default()
        };
        let cut = result(&id, "cmd".to_owned(), over_budget, Duration::ZERO, 7).truncated;
        let limit = cut.map(|cut| (cut.limit, cut.limit_bytes));
        assert_eq!(limit, Some((TruncatedBy::Buffers, 7)));
        // Without a cut, an incomplete character is the command's own.
        assert_eq!(of(b"a\xc3", 0).encoding, "base64");
    }

    #[test]
    fn both_streams_are_base64_if_either_is_not_text() {
        let bad = || vec![0xff];
        let ok = || "ü".as_bytes().to_vec();
        let coded = |b: &[u8]| BASE64.encode(b);
        assert_eq!(encode(ok(), ok()), ("ü".into(), "ü".into(), "utf-8"));
        assert_eq!(encode(bad(), ok()), (coded(&bad()), coded(&ok()), "base64"));
        assert_eq!(encode(ok(), bad()), (coded(&ok()), coded(&bad()), "base64"));
        assert_eq!(
            encode(bad(), bad()),
            (coded(&bad()), coded(&bad()), "base64")
        );
        assert_eq!(
            encode(vec![], vec![]),
            (String::new(), String::new(), "utf-8")
        );
    }
}
