//! Runs short programs for a limited time.

use std::{
    io,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

/// Interval at which the end of the program is checked. Such programs typically run for some 50 ms.
const POLL: Duration = Duration::from_millis(2);

/// Program that has ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status and its output.
    pub output: Output,
    /// True if it was killed because it took too long.
    pub is_killed: bool,
}

/// Runs a program without input until it ends, and kills it after `limit`. Blocks. Its output must
/// fit into pipes: it is read after the end.
///
/// # Errors
/// The program cannot be run or killed.
pub fn run_within(limit: Duration, command: &mut Command) -> io::Result<Ended> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let deadline = Instant::now() + limit;
    let mut is_killed = false;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            is_killed = true;
        }
        std::thread::sleep(POLL);
    }
    Ok(Ended {
        output: child.wait_with_output()?,
        is_killed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_status_of_a_program_are_returned() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let ended = run_within(Duration::from_secs(60), &mut command).expect("run");
        assert!(!ended.is_killed);
        assert_eq!(ended.output.status.code(), Some(3));
        assert_eq!(
            (&*ended.output.stdout, &*ended.output.stderr),
            (&b"out\n"[..], &b"err\n"[..])
        );
    }

    #[test]
    fn program_that_takes_too_long_is_killed() {
        let mut command = Command::new("/bin/sleep");
        command.arg("1000");
        let ended = run_within(Duration::from_millis(50), &mut command).expect("run");
        assert!(ended.is_killed && !ended.output.status.success());
    }
}
