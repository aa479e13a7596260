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
    /// True if the time limit ended the command.
    pub is_timed_out: bool,
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

    /// Same as [`exec`](Self::exec), with output that is accounted to the budget of `reserved`.
    /// Bytes that are reserved already are used first. Output for which the budget has no room is
    /// dropped and counted.
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
    let mut room = Room {
        needed_bytes: 0,
        reserved,
    };
    while let Some(event) = events.next().await? {
        match event.event {
            Some(Event::Data(data)) => match data.output {
                Some(Output::Stdout(bytes)) => done.keep(Stream::Stdout, &bytes, &mut room),
                Some(Output::Stderr(bytes)) => done.keep(Stream::Stderr, &bytes, &mut room),
                Some(Output::Pty(_)) | None => {}
            },
            Some(Event::End(end)) => {
                done.exit_code = end.exit_code;
                // The guest agent also describes a normal exit; that text is dropped.
                let ended = end.error.filter(|_| !end.exited).unwrap_or_default();
                done.error = match (limit, events.next().await) {
                    (Some(limit), Err(after)) if after.code == ErrorCode::DeadlineExceeded => {
                        done.is_timed_out = true;
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

/// Output stream of a command.
#[derive(Debug, Clone, Copy)]
enum Stream {
    Stdout,
    Stderr,
}

/// Room for output in the budget.
struct Room<'a> {
    /// Bytes of the output so far, and of its JSON form.
    needed_bytes: usize,
    reserved: &'a mut Reservation,
}

impl Room<'_> {
    /// Reserves room for output and for its JSON form: both exist while the response is encoded.
    /// Returns false if the budget has none.
    fn reserve(&mut self, output: &[u8]) -> bool {
        let needed = self.needed_bytes + output.len() + json_bytes(output);
        let missing = needed.saturating_sub(self.reserved.bytes());
        let is_reserved = missing == 0
            || self.reserved.grow(missing.max(GROWTH_BYTES)).is_ok()
            || self.reserved.grow(missing).is_ok();
        if is_reserved {
            self.needed_bytes = needed;
        }
        is_reserved
    }
}

impl ExecOutput {
    /// Appends output of a stream, up to the limit and the budget. Counts what is dropped.
    fn keep(&mut self, stream: Stream, bytes: &[u8], room: &mut Room<'_>) {
        let (collected, dropped_bytes) = match stream {
            Stream::Stdout => (&mut self.stdout, &mut self.stdout_dropped_bytes),
            Stream::Stderr => (&mut self.stderr, &mut self.stderr_dropped_bytes),
        };
        // After a gap, nothing is kept.
        let free = match *dropped_bytes {
            0 => MAX_EXEC_OUTPUT_BYTES.saturating_sub(collected.len()),
            _ => 0,
        };
        let mut kept = &bytes[..bytes.len().min(free)];
        if !room.reserve(kept) {
            self.is_over_budget = true;
            kept = &[];
        }
        collected.extend_from_slice(kept);
        *dropped_bytes += u64::try_from(bytes.len() - kept.len()).unwrap_or(u64::MAX);
    }
}

/// Returns the length of bytes as a JSON string, or more if they become base64.
fn json_bytes(bytes: &[u8]) -> usize {
    let escaped = |byte: &u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 2,
        0..0x20 => 6,
        0x20..0x80 => 1,
        // Not UTF-8 perhaps; then each byte has 4/3 characters.
        0x80.. => 2,
    };
    bytes.iter().map(escaped).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_kept_up_to_its_limit_and_that_of_the_budget() {
        let budget = ByteBudget::new(200_000);
        let mut reserved = budget.reserve(GROWTH_BYTES).expect("room");
        let mut room = Room {
            needed_bytes: 0,
            reserved: &mut reserved,
        };
        let mut output = ExecOutput::default();
        // Text, and as much JSON.
        output.keep(Stream::Stdout, &[b'a'; 1000], &mut room);
        assert_eq!(room.reserved.bytes(), GROWTH_BYTES);
        output.keep(Stream::Stderr, &vec![b'a'; 99_000], &mut room);
        assert_eq!(room.reserved.bytes(), 200_000);
        assert!(!output.is_over_budget);
        output.keep(Stream::Stdout, b"b", &mut room);
        assert_eq!(
            (output.stdout.len(), output.stdout_dropped_bytes),
            (1000, 1)
        );
        assert!(output.is_over_budget);
        assert_eq!(
            (output.stderr.len(), output.stderr_dropped_bytes),
            (99_000, 0)
        );
    }

    #[test]
    fn a_stream_ends_at_its_limit_and_at_its_first_gap() {
        let mut reserved = ByteBudget::unlimited().empty();
        let mut room = Room {
            needed_bytes: 0,
            reserved: &mut reserved,
        };
        let mut output = ExecOutput::default();
        output.keep(
            Stream::Stdout,
            &vec![b'a'; MAX_EXEC_OUTPUT_BYTES - 1],
            &mut room,
        );
        output.keep(Stream::Stdout, b"bcd", &mut room);
        output.keep(Stream::Stdout, b"e", &mut room);
        assert_eq!(output.stdout.len(), MAX_EXEC_OUTPUT_BYTES);
        assert_eq!(
            (output.stdout_dropped_bytes, output.is_over_budget),
            (3, false)
        );
        output.keep(Stream::Stderr, b"f", &mut room);
        assert_eq!(output.stderr, b"f");
    }

    #[test]
    fn json_form_of_output_is_not_underestimated() {
        let all: Vec<u8> = (0..0x80).collect();
        for bytes in [all.as_slice(), "äöü€😀".as_bytes(), b"\0\0\0", b"plain"] {
            let text = std::str::from_utf8(bytes).expect("text");
            let json = serde_json::to_string(text).expect("JSON");
            assert!(json_bytes(bytes) + 2 >= json.len(), "{text:?}");
        }
        assert!(json_bytes(&[0xff; 300]) >= 400);
    }
}
