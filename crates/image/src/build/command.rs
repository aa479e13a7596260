//! Runs tools with a deadline. Their output goes to the progress display, and its last lines into
//! the error.

use std::{
    collections::VecDeque,
    io::{self, BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use parking_lot::{Mutex, MutexGuard};

use super::Progress;

/// Number of output lines that an error contains.
const LINES_KEPT: usize = 15;

/// Errors of running a tool.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// The tool could not be started.
    #[error("failed to run `{tool}` (`wrenn doctor` lists missing programs)")]
    Start {
        /// Name of the tool.
        tool: String,
        /// Cause of the failure.
        source: io::Error,
    },
    /// The tool exited with a failure.
    #[error("`{tool}` failed ({status}):\n{output}")]
    Failed {
        /// Name of the tool.
        tool: String,
        /// Exit status.
        status: ExitStatus,
        /// Last lines of its output.
        output: String,
    },
    /// The build was cancelled.
    #[error("the build was interrupted; the next build reuses the steps that were completed")]
    Stopped,
    /// The tool exceeded its deadline and was killed.
    #[error("`{tool}` timed out after {deadline:?}:\n{output}")]
    Deadline {
        /// Name of the tool.
        tool: String,
        /// The deadline.
        deadline: Duration,
        /// Last lines of its output.
        output: String,
    },
}

/// Cancels a build from another thread: the running tool is killed together with its children, and
/// no other tool is started.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<Mutex<Tools>>);

#[derive(Debug, Default)]
struct Tools {
    /// Process group of the running tool.
    running: Option<Pid>,
    is_stopped: bool,
}

impl Stop {
    /// Cancels the build.
    pub fn stop(&self) {
        let mut tools = self.tools();
        tools.is_stopped = true;
        if let Some(group) = tools.running {
            // The tool may have exited in the meantime.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }

    fn is_stopped(&self) -> bool {
        self.tools().is_stopped
    }

    /// Starts a tool in its own process group.
    fn spawn(&self, command: &mut Command, tool: &str) -> Result<Child, CommandError> {
        let mut tools = self.tools();
        if tools.is_stopped {
            return Err(CommandError::Stopped);
        }
        let child = command.process_group(0).spawn();
        let child = child.map_err(|source| CommandError::Start {
            tool: tool.to_owned(),
            source,
        })?;
        tools.running = Some(group_of(&child));
        Ok(child)
    }

    /// Forgets the running tool. Must be called before the tool is waited for: afterwards its
    /// process id may be reused.
    fn forget(&self) {
        self.tools().running = None;
    }

    fn tools(&self) -> MutexGuard<'_, Tools> {
        self.0.lock()
    }
}

/// Runs a tool to completion and returns its standard output, which must be text of moderate
/// length.
pub(super) fn run(
    command: &mut Command,
    deadline: Duration,
    progress: &dyn Progress,
    stop: &Stop,
) -> Result<String, CommandError> {
    let tool = command.get_program().to_string_lossy().into_owned();
    let command = command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = stop.spawn(command, &tool)?;
    let (output, last, in_time) = follow(&mut child, deadline, progress);
    stop.forget();
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
        Ok(_) if stop.is_stopped() => Err(CommandError::Stopped),
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

/// Reads standard output and standard error until both are closed or the deadline passes.
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

/// Kills the tool and its children.
fn kill_group(child: &mut Child) {
    // The tool may have exited in the meantime.
    let _ = killpg(group_of(child), Signal::SIGKILL);
    let _ = child.wait();
}

fn group_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX))
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
        let stop = Stop::default();
        run(
            Command::new("sh").args(["-c", script]),
            deadline,
            &Silent,
            &stop,
        )
    }

    /// Notifies a channel of each line, which shows that the tool has started.
    struct Heard(mpsc::Sender<()>);
    impl Progress for Heard {
        fn step(&self, _: &str) {}
        fn line(&self, _: &str) {
            let _ = self.0.send(());
        }
        fn done(&self, _: &str, _: Duration) {}
    }

    #[test]
    fn a_build_that_is_stopped_ends_its_tool_and_begins_no_other() {
        let stop = Stop::default();
        let (begun, heard) = mpsc::channel();
        let stopper = stop.clone();
        let stopping = std::thread::spawn(move || {
            heard.recv().expect("it runs");
            stopper.stop();
        });
        let long = Duration::from_secs(600);
        let mut tool = Command::new("sh");
        let tool = tool.args(["-c", "echo begun; sleep 500 & wait"]);
        let stopped = run(tool, long, &Heard(begun), &stop).expect_err("stopped");
        assert!(matches!(stopped, CommandError::Stopped), "{stopped}");
        stopping.join().expect("no panic");
        let next = run(&mut Command::new("true"), long, &Silent, &stop).expect_err("stopped");
        assert!(matches!(next, CommandError::Stopped), "{next}");
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
        // A killed child disappears only once the kernel has processed the signal.
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
            &Stop::default(),
        )
        .expect_err("missing");
        assert!(error.to_string().contains("no-such-tool"), "{error}");
    }
}
