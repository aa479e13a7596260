//! Runs tools with a deadline; what they print goes to the progress display, and its end into the error.

use std::{
    collections::VecDeque,
    io::{self, BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use super::Progress;

/// How many of its last lines an error tells.
const LINES_KEPT: usize = 15;

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// It could not be started.
    #[error("could not start `{tool}`: {source}; `wrenn doctor` says what is missing")]
    Start {
        /// The tool.
        tool: String,
        /// The failure.
        source: io::Error,
    },
    /// It failed.
    #[error("`{tool}` failed ({status}):\n{output}")]
    Failed {
        /// The tool.
        tool: String,
        /// How it ended.
        status: ExitStatus,
        /// The last it printed.
        output: String,
    },
    /// It took too long and was killed.
    #[error("`{tool}` was not done within {deadline:?}:\n{output}")]
    Deadline {
        /// The tool.
        tool: String,
        /// How long it had.
        deadline: Duration,
        /// The last it printed.
        output: String,
    },
}

/// Runs a tool to its end and returns its standard output, which must be text of no great length.
pub(super) fn run(
    command: &mut Command,
    deadline: Duration,
    progress: &dyn Progress,
) -> Result<String, CommandError> {
    let tool = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|source| CommandError::Start {
            tool: tool.clone(),
            source,
        })?;
    let (output, last, in_time) = follow(&mut child, deadline, progress);
    let last = last.join("\n");
    if !in_time {
        kill_group(&mut child);
        return Err(CommandError::Deadline {
            tool,
            deadline,
            output: last,
        });
    }
    match child.wait() {
        Ok(status) if status.success() => Ok(output),
        Ok(status) => Err(CommandError::Failed {
            tool,
            status,
            output: last,
        }),
        Err(source) => Err(CommandError::Start { tool, source }),
    }
}

enum Line {
    Out(String),
    Err(String),
}

/// Reads both outputs until both are closed or the deadline is over.
fn follow(
    child: &mut Child,
    deadline: Duration,
    progress: &dyn Progress,
) -> (String, Vec<String>, bool) {
    let (sender, lines) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        read_lines(stdout, sender.clone(), Line::Out);
    }
    if let Some(stderr) = child.stderr.take() {
        read_lines(stderr, sender, Line::Err);
    }
    let end = Instant::now() + deadline;
    let mut output = String::new();
    let mut last = VecDeque::new();
    let in_time = loop {
        let text = match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(Line::Out(text)) => {
                output.push_str(&text);
                output.push('\n');
                text
            }
            Ok(Line::Err(text)) => text,
            Err(mpsc::RecvTimeoutError::Disconnected) => break true,
            Err(mpsc::RecvTimeoutError::Timeout) => break false,
        };
        progress.line(&text);
        if last.len() == LINES_KEPT {
            last.pop_front();
        }
        last.push_back(text);
    };
    (output, last.into(), in_time)
}

fn read_lines(
    from: impl io::Read + Send + 'static,
    to: mpsc::Sender<Line>,
    wrap: fn(String) -> Line,
) {
    std::thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n') {
            let Ok(line) = line else { return };
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if to.send(wrap(text)).is_err() {
                return;
            }
        }
    });
}

/// Ends the tool and whatever it started.
fn kill_group(child: &mut Child) {
    let group = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    // It may have ended by itself in the meantime.
    let _ = killpg(group, Signal::SIGKILL);
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Silent;
    impl Progress for Silent {
        fn step(&self, _: &str) {}
        fn line(&self, _: &str) {}
        fn done(&self, _: &str, _: Duration) {}
    }

    fn shell(script: &str, deadline: Duration) -> Result<String, CommandError> {
        run(Command::new("sh").args(["-c", script]), deadline, &Silent)
    }

    #[test]
    fn a_failure_tells_the_last_lines() {
        let error =
            shell("(seq 100; echo why) >&2; exit 3", Duration::from_secs(20)).expect_err("failed");
        let text = error.to_string();
        assert!(
            text.contains("why") && text.contains("100") && !text.contains("\n50\n"),
            "{text}"
        );
    }

    #[test]
    fn a_tool_that_hangs_is_killed_with_its_children() {
        let marker = format!("{}", 86_400 + std::process::id());
        let error = shell(
            &format!("sleep {marker} & wait"),
            Duration::from_millis(300),
        )
        .expect_err("too long");
        assert!(matches!(error, CommandError::Deadline { .. }), "{error}");
        let is_left = || {
            let found = Command::new("pgrep")
                .args(["-f", &format!("^sleep {marker}")])
                .output();
            !found.expect("pgrep").stdout.is_empty()
        };
        // A child that was killed dies when the kernel comes to it.
        let end = Instant::now() + Duration::from_secs(10);
        while is_left() {
            assert!(Instant::now() < end, "a child is left");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn a_tool_that_is_not_there_is_named() {
        let error = run(
            &mut Command::new("no-such-tool"),
            Duration::from_secs(1),
            &Silent,
        )
        .expect_err("missing");
        assert!(error.to_string().contains("no-such-tool"), "{error}");
    }
}
