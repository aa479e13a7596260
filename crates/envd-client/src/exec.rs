//! Commands that run to their end, with their output collected.

use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};
use wrenn_model::{ByteBudget, Reservation, limits::MAX_EXEC_OUTPUT_BYTES};
use wrenn_proto::rpc::process::{
    ProcessConfig, StartRequest,
    process_event::{Event, data_event::Output},
};

use crate::{EnvdClient, ProcessEvents, deadline::EXEC_MARGIN};

/// Minimum by which the reservation of an exec grows, in bytes.
const GROWTH_BYTES: usize = 64 * 1024;

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
    /// True if output was dropped because the budget had no room for it.
    pub is_over_budget: bool,
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
        let mut reserved = ByteBudget::unlimited().empty();
        self.exec_within(exec, &mut reserved).await
    }

    /// Same as [`exec`](Self::exec), with output that is accounted to the budget of `reserved`. Bytes
    /// that are reserved already are used first. Output for which the budget has no room is dropped
    /// and counted.
    ///
    /// # Errors
    /// As listed in the crate's documentation.
    pub async fn exec_within(
        &self,
        exec: Exec,
        reserved: &mut Reservation,
    ) -> Result<ExecOutput, ConnectError> {
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
            collect(events, time_limit, reserved).await
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
    reserved: &mut Reservation,
) -> Result<ExecOutput, ConnectError> {
    let mut done = ExecOutput::default();
    while let Some(event) = events.next().await? {
        match event.event {
            Some(Event::Data(data)) => match data.output {
                Some(Output::Stdout(bytes)) => {
                    let kept = done.room(done.stdout.len(), done.stdout_dropped_bytes, bytes.len());
                    let kept = done.reserve(kept, reserved);
                    done.stdout_dropped_bytes += append(&mut done.stdout, &bytes, kept);
                }
                Some(Output::Stderr(bytes)) => {
                    let kept = done.room(done.stderr.len(), done.stderr_dropped_bytes, bytes.len());
                    let kept = done.reserve(kept, reserved);
                    done.stderr_dropped_bytes += append(&mut done.stderr, &bytes, kept);
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

impl ExecOutput {
    /// Returns how many of the next bytes of a stream may be kept. After a gap, nothing is.
    fn room(&self, collected: usize, dropped_bytes: u64, next: usize) -> usize {
        if dropped_bytes > 0 {
            return 0;
        }
        next.min(MAX_EXEC_OUTPUT_BYTES.saturating_sub(collected))
    }

    /// Reserves the next bytes. Returns 0 if the budget has no room for them.
    fn reserve(&mut self, next: usize, reserved: &mut Reservation) -> usize {
        let needed = self.stdout.len() + self.stderr.len() + next;
        let missing = needed.saturating_sub(reserved.bytes());
        if missing == 0
            || reserved.grow(missing.max(GROWTH_BYTES)).is_ok()
            || reserved.grow(missing).is_ok()
        {
            return next;
        }
        self.is_over_budget = true;
        0
    }
}

/// Appends the first `kept` bytes. Returns the number of the others.
fn append(collected: &mut Vec<u8>, bytes: &[u8], kept: usize) -> u64 {
    let (kept, dropped) = bytes.split_at(kept);
    collected.extend_from_slice(kept);
    u64::try_from(dropped.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_kept_up_to_its_limit_and_that_of_the_budget() {
        let budget = ByteBudget::new(200_000);
        let mut reserved = budget.reserve(GROWTH_BYTES).expect("room");
        let mut output = ExecOutput::default();
        assert_eq!(output.room(0, 0, 10), 10);
        assert_eq!(output.room(MAX_EXEC_OUTPUT_BYTES - 1, 0, 10), 1);
        // After a gap, nothing of the stream is kept.
        assert_eq!(output.room(5, 1, 10), 0);
        assert_eq!(output.reserve(1000, &mut reserved), 1000);
        assert_eq!(reserved.bytes(), GROWTH_BYTES);
        output.stdout = vec![0; GROWTH_BYTES];
        assert_eq!(output.reserve(1, &mut reserved), 1);
        assert_eq!(reserved.bytes(), 2 * GROWTH_BYTES);
        output.stderr = vec![0; GROWTH_BYTES];
        let left = 200_000 - 2 * GROWTH_BYTES;
        assert_eq!(output.reserve(left, &mut reserved), left);
        assert!(!output.is_over_budget);
        assert_eq!(output.reserve(left + 1, &mut reserved), 0);
        assert!(output.is_over_budget);
    }
}
