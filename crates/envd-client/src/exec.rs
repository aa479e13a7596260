//! Commands that run to their end, with their output collected.

use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};
use wrenn_model::limits::MAX_EXEC_OUTPUT_BYTES;
use wrenn_proto::rpc::process::{
    ProcessConfig, ProcessSelector, Signal, StartRequest,
    process_event::{Event, data_event::Output},
    process_selector::Selector,
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
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Exit code; -1 if a signal ended the command.
    pub exit_code: i32,
    /// Set if a signal or the time limit ended the command: `signal: killed`.
    pub error: String,
}

impl EnvdClient {
    /// Runs a command until it ends and collects its output, up to 16 MiB per stream.
    ///
    /// # Errors
    /// `out_of_range` if the command prints more; it is then killed. Otherwise as listed in the
    /// crate's documentation.
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
            self.collect(events, time_limit).await
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

    async fn collect(
        &self,
        mut events: ProcessEvents,
        limit: Option<Duration>,
    ) -> Result<ExecOutput, ConnectError> {
        let mut done = ExecOutput::default();
        let mut pid = None;
        while let Some(event) = events.next().await? {
            match event.event {
                Some(Event::Start(start)) => pid = Some(start.pid),
                Some(Event::Data(data)) => {
                    let (buffer, bytes, name) = match data.output {
                        Some(Output::Stdout(bytes)) => (&mut done.stdout, bytes, "stdout"),
                        Some(Output::Stderr(bytes)) => (&mut done.stderr, bytes, "stderr"),
                        Some(Output::Pty(_)) | None => continue,
                    };
                    if buffer.len() + bytes.len() > MAX_EXEC_OUTPUT_BYTES {
                        self.kill(pid).await;
                        return Err(ConnectError::out_of_range(format!(
                            "the command printed more than {MAX_EXEC_OUTPUT_BYTES} bytes to {name} and was killed; \
                             stream its output instead"
                        )));
                    }
                    buffer.extend_from_slice(&bytes);
                }
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
                Some(Event::Keepalive(_)) | None => {}
            }
        }
        Err(ConnectError::unavailable(
            "the command's output ended before the command's exit was reported",
        ))
    }

    /// Kills a process whose output is no longer needed. Best effort: it may have ended.
    async fn kill(&self, pid: Option<u32>) {
        let Some(pid) = pid else { return };
        let process = ProcessSelector {
            selector: Some(Selector::Pid(pid)),
            ..Default::default()
        };
        let _ = self.signal(process, Signal::SIGNAL_SIGKILL).await;
    }
}
