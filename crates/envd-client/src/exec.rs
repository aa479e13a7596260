//! Commands that run to their end, with their output collected.

use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};
use wrenn_model::limits::MAX_EXEC_OUTPUT_BYTES;
use wrenn_proto::rpc::process::{
    ProcessConfig, StartRequest,
    process_event::{Event, data_event::Output},
};

use crate::{EnvdClient, ProcessEvents, deadline::EXEC_MARGIN};

/// Command to run to its end.
#[derive(Debug, Clone, Default)]
pub struct Exec {
    /// Program, arguments, environment and directory.
    pub process: ProcessConfig,
    /// User who runs the command; the guest agent's default if empty.
    pub user: String,
    /// Time after which the guest agent kills the command.
    pub time_limit: Option<Duration>,
    /// Name by which the process can be found while it runs.
    pub tag: Option<String>,
}

/// Result of a command.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// Standard output, at most 16 MiB.
    pub stdout: Vec<u8>,
    /// Standard error, at most 16 MiB.
    pub stderr: Vec<u8>,
    /// Number of bytes of standard output beyond the limit, which were dropped.
    pub stdout_dropped_bytes: u64,
    /// Number of bytes of standard error beyond the limit, which were dropped.
    pub stderr_dropped_bytes: u64,
    /// Exit code; -1 if a signal ended the command.
    pub exit_code: i32,
    /// Set if a signal or the time limit ended the command: `signal: killed`.
    pub error: String,
}

impl EnvdClient {
    /// Runs a command until it ends and collects its output, up to 16 MiB per stream. Output beyond
    /// that is dropped and counted.
    ///
    /// # Errors
    /// As listed in the crate's documentation.
    pub async fn exec(&self, exec: Exec) -> Result<ExecOutput, ConnectError> {
        let Exec {
            process,
            user,
            time_limit,
            tag,
        } = exec;
        let start = StartRequest {
            process: process.into(),
            tag,
            // No client can write to the command's input, so the input is at its end from the
            // start. A command that reads it does not block forever.
            stdin: Some(false),
            ..Default::default()
        };
        let run = async {
            let events = self.start(start, &user, time_limit, false).await?;
            collect(events, time_limit).await
        };
        let Some(limit) = time_limit else {
            return run.await;
        };
        let run = tokio::time::timeout(limit + EXEC_MARGIN, run);
        run.await.unwrap_or_else(|_| {
            Err(ConnectError::deadline_exceeded(format!(
                "the end of the command was not reported within {EXEC_MARGIN:?} after its time limit of {limit:?}"
            )))
        })
    }
}

async fn collect(
    mut events: ProcessEvents,
    limit: Option<Duration>,
) -> Result<ExecOutput, ConnectError> {
    let mut done = ExecOutput::default();
    while let Some(event) = events.next().await? {
        match event.event {
            Some(Event::Data(data)) => match data.output {
                Some(Output::Stdout(bytes)) => {
                    done.stdout_dropped_bytes += append(&mut done.stdout, &bytes);
                }
                Some(Output::Stderr(bytes)) => {
                    done.stderr_dropped_bytes += append(&mut done.stderr, &bytes);
                }
                Some(Output::Pty(_)) | None => {}
            },
            Some(Event::End(end)) => {
                done.exit_code = end.exit_code;
                // The guest agent also describes a normal exit; that text is dropped.
                let ended = end.error.filter(|_| !end.exited).unwrap_or_default();
                done.error = match (limit, events.next().await) {
                    (Some(limit), Err(after)) if after.code == ErrorCode::DeadlineExceeded => {
                        format!("timed out after {} s: {ended}", limit.as_secs())
                    }
                    _ => ended,
                };
                return Ok(done);
            }
            // Output of a command with a subscriber from its start is not lost.
            Some(Event::Start(_) | Event::Lost(_) | Event::Keepalive(_)) | None => {}
        }
    }
    Err(ConnectError::unavailable(
        "the command's output ended before the command's exit was reported",
    ))
}

/// Appends output up to the limit. Returns the number of bytes beyond it.
fn append(collected: &mut Vec<u8>, bytes: &[u8]) -> u64 {
    let room = MAX_EXEC_OUTPUT_BYTES.saturating_sub(collected.len());
    let (kept, dropped) = bytes.split_at(bytes.len().min(room));
    collected.extend_from_slice(kept);
    u64::try_from(dropped.len()).unwrap_or(u64::MAX)
}
