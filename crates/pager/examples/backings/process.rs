//! Processes of the benchmark: this program again, with commands on standard input and one line
//! per reply on standard output.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::ExitStatusExt as _,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use nix::sys::{resource, signal::Signal};

use crate::Failure;

const DEADLINE: Duration = Duration::from_secs(120);

/// Resources that a process has used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usage {
    pub(crate) cpu_us: f64,
    pub(crate) faults: f64,
}

impl Usage {
    /// Returns the use since `earlier`.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            cpu_us: self.cpu_us - earlier.cpu_us,
            faults: self.faults - earlier.faults,
        }
    }
}

/// Effect of a command.
pub(crate) enum Effect {
    Reply(String),
    Exit(ExitStatus),
    Waits,
}

pub(crate) struct Process {
    child: Child,
    input: Option<ChildStdin>,
    replies: Receiver<String>,
}

impl Process {
    pub(crate) fn spawn(args: &[&str]) -> Result<Self, Failure> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take();
        let output = child.stdout.take().ok_or("no output")?;
        let (sender, replies) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut process = Self {
            child,
            input,
            replies,
        };
        process.ask("usage")?;
        Ok(process)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn send(&mut self, command: &str) -> Result<(), Failure> {
        let input = self.input.as_mut().ok_or("no input")?;
        Ok(input.write_all(format!("{command}\n").as_bytes())?)
    }

    /// Waits for a reply or the end of the process.
    pub(crate) fn effect(&mut self, within: Duration) -> Result<Effect, Failure> {
        Ok(match self.replies.recv_timeout(within) {
            Ok(reply) => Effect::Reply(reply),
            Err(RecvTimeoutError::Timeout) => Effect::Waits,
            Err(RecvTimeoutError::Disconnected) => Effect::Exit(self.child.wait()?),
        })
    }

    pub(crate) fn reply(&mut self) -> Result<String, Failure> {
        match self.effect(DEADLINE)? {
            Effect::Reply(reply) => Ok(reply),
            Effect::Exit(status) => Err(format!("the process ended: {status}").into()),
            Effect::Waits => Err("the process does not answer".into()),
        }
    }

    pub(crate) fn ask(&mut self, command: &str) -> Result<String, Failure> {
        self.send(command)?;
        self.reply()
    }

    pub(crate) fn ask_number(&mut self, command: &str) -> Result<f64, Failure> {
        Ok(self.ask(command)?.parse()?)
    }

    pub(crate) fn usage(&mut self) -> Result<Usage, Failure> {
        let text = self.ask("usage")?;
        let (cpu, faults) = text.split_once(' ').ok_or("no usage")?;
        Ok(Usage {
            cpu_us: cpu.parse()?,
            faults: faults.parse()?,
        })
    }

    /// Kills the process. Returns the time until its end, or `None` if that exceeds `within`.
    pub(crate) fn kill(&mut self, within: Duration) -> Result<Option<Duration>, Failure> {
        let begun = Instant::now();
        self.child.kill()?;
        while begun.elapsed() < within {
            if self.child.try_wait()?.is_some() {
                return Ok(Some(begun.elapsed()));
            }
            thread::sleep(Duration::from_micros(200));
        }
        Ok(None)
    }
}

impl Drop for Process {
    /// Lets the process end by itself: a FUSE server unmounts its file.
    fn drop(&mut self) {
        drop(self.input.take());
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(2) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        // A process that cannot be killed yet ends with the server that it waits for.
        let _ = self.kill(Duration::from_secs(5));
    }
}

/// Describes the end of a process.
pub(crate) fn describe(status: ExitStatus) -> String {
    match status.signal().map(Signal::try_from) {
        Some(Ok(signal)) => signal.to_string(),
        _ => status.to_string(),
    }
}

/// Runs the commands on standard input until its end.
pub(crate) fn serve(
    mut run: impl FnMut(&[&str]) -> Result<String, Failure>,
) -> Result<(), Failure> {
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let reply = match words[..] {
            ["usage"] => usage()?,
            _ => run(&words)?,
        };
        let mut output = std::io::stdout().lock();
        writeln!(output, "{reply}")?;
        output.flush()?;
    }
    Ok(())
}

fn usage() -> Result<String, Failure> {
    let usage = resource::getrusage(resource::UsageWho::RUSAGE_SELF)?;
    let us = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 * 1e6 + time.tv_usec() as f64;
    let cpu = us(usage.user_time()) + us(usage.system_time());
    let faults = usage.minor_page_faults() + usage.major_page_faults();
    Ok(format!("{cpu} {faults}"))
}
