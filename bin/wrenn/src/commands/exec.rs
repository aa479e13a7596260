//! `wrenn sandbox exec`: runs a program in a sandbox. `wrenn run` shares the streaming.

use std::{cell::Cell, collections::BTreeMap, convert::Infallible, time::Duration};

use anyhow::{Context, bail};
use clap::Args;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use wrenn_api_types::ExecRequest;
use wrenn_model::{SandboxId, limits::MAX_TIMEOUT_SEC};

use crate::{
    client::{Client, Event, Receiver, Sender, Start, StreamKind},
    interrupt::{Interrupted, Interrupts},
    output,
};

/// Exit code of this process if the end of the program corresponds to no exit code.
const EXIT_UNKNOWN: i32 = 255;

/// Size of the chunks in which input is read and sent, in bytes.
const INPUT_CHUNK_BYTES: usize = 32 * 1024;

/// Time within which the request to terminate a command must be sent.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);

/// Time within which an interrupted command must end; the server kills it after 5 s.
const END_TIMEOUT: Duration = Duration::from_secs(8);

/// Program to run, and its options.
#[derive(Debug, Clone, Args)]
pub(crate) struct ProgramArgs {
    /// Working directory [default: the user's home]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User to run as [default: the template's]
    #[arg(short, long, value_name = "NAME")]
    user: Option<String>,
    /// Timeout in seconds after which the command is killed; 0: none [default: 0]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(..=i64::from(MAX_TIMEOUT_SEC)))]
    timeout: Option<u32>,
    /// Pass standard input to the command
    #[arg(short, long)]
    interactive: bool,
    /// Command and its arguments
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

impl ProgramArgs {
    /// Returns the program and its arguments.
    #[cfg(test)]
    pub(crate) fn command(&self) -> &[String] {
        &self.command
    }

    /// Returns the first message of a stream. Without `--timeout` the command may run indefinitely.
    pub(crate) fn start(&self, envs: BTreeMap<String, String>) -> Start {
        let (cmd, args) = self.split();
        Start {
            cmd,
            args,
            envs,
            cwd: self.workdir.clone(),
            user: self.user.clone(),
            timeout_sec: Some(self.timeout.unwrap_or(0).into()),
            stdin: self.interactive,
            ..Start::default()
        }
    }

    fn request(&self, envs: BTreeMap<String, String>) -> ExecRequest {
        let (cmd, args) = self.split();
        ExecRequest {
            cmd,
            args,
            envs,
            cwd: self.workdir.clone(),
            user: self.user.clone(),
            timeout_sec: Some(self.timeout.unwrap_or(0).into()),
            background: false,
            tag: None,
        }
    }

    fn split(&self) -> (String, Vec<String>) {
        match self.command.split_first() {
            Some((cmd, args)) => (cmd.clone(), args.to_vec()),
            None => (String::new(), Vec::new()),
        }
    }
}

/// Arguments of `wrenn sandbox exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Sandbox id
    id: SandboxId,
    /// Environment variable of the command (repeatable)
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = env_pair)]
    env: Vec<(String, String)>,
    /// Run the command in the background and print its process id
    #[arg(short, long, conflicts_with = "interactive")]
    background: bool,
    /// Tag by which a background command can be found
    #[arg(long, requires = "background")]
    tag: Option<String>,
    /// Wait for the command to end and print the result as JSON
    #[arg(long, conflicts_with = "interactive")]
    json: bool,
    #[command(flatten)]
    program: ProgramArgs,
}

/// Runs a command in a sandbox; its exit code becomes that of this process.
pub(crate) async fn run(client: &Client, args: ExecArgs) -> anyhow::Result<i32> {
    let envs: BTreeMap<String, String> = args.env.into_iter().collect();
    if args.background {
        let mut request = args.program.request(envs);
        (request.background, request.tag) = (true, args.tag);
        let started = client.exec_background(&args.id, &request).await?;
        if args.json {
            output::json(&started)?;
        } else {
            output::line(started.pid)?;
        }
        return Ok(0);
    }
    if args.json {
        let result = client.exec(&args.id, &args.program.request(envs)).await?;
        output::json(&result)?;
        return Ok(exit_code(result.exit_code, result.error.as_deref()));
    }
    let mut interrupts = Interrupts::new()?;
    stream(client, &args.id, &args.program.start(envs), &mut interrupts)
        .await
        .map(Ended::code)
}

/// End of a stream.
pub(crate) enum Ended {
    /// The program ended with this code.
    Exit(i32),
    /// The user interrupted the program.
    Interrupted(Interrupted),
}

impl Ended {
    /// Returns the exit code of this process.
    pub(crate) fn code(self) -> i32 {
        match self {
            Self::Exit(code) => code,
            Self::Interrupted(interrupted) => interrupted.exit_code(),
        }
    }
}

/// Runs a program until it ends, and passes its output through. A signal to this process terminates
/// the program; a second signal stops waiting for its end.
pub(crate) async fn stream(
    client: &Client,
    id: &SandboxId,
    start: &Start,
    interrupts: &mut Interrupts,
) -> anyhow::Result<Ended> {
    let socket = client.open(id, StreamKind::Exec, start).await?;
    let (mut sender, mut receiver) = (socket.sender, socket.receiver);
    let pid = Cell::new(None);
    let output = pass_output(&mut receiver, &pid);
    tokio::pin!(output);
    let interrupted = tokio::select! {
        ended = &mut output => {
            let (code, error) = ended?;
            return Ok(Ended::Exit(exit_code(code, error.as_deref())));
        }
        broken = pass_input(&mut sender, start.stdin) => match broken {
            Err(error) => return Err(error),
            Ok(never) => match never {},
        },
        interrupted = interrupts.recv() => interrupted,
    };
    // Remaining output is still passed through; the result no longer matters.
    let end = async {
        kill(client, id, &mut sender, pid.get()).await;
        let _ = tokio::time::timeout(END_TIMEOUT, output).await;
    };
    tokio::select! {
        () = end => {}
        _ = interrupts.recv() => {}
    }
    Ok(Ended::Interrupted(interrupted))
}

/// Terminates the program. If it does not read its input, the stream is full and cannot carry the
/// request, which is then sent as a separate call.
async fn kill(client: &Client, id: &SandboxId, sender: &mut Sender, pid: Option<u32>) {
    let killed = tokio::time::timeout(KILL_TIMEOUT, sender.kill()).await;
    if let (Err(_) | Ok(Err(_)), Some(pid)) = (killed, pid) {
        // A failure means that the sandbox is gone or unreachable; nothing more can be done here.
        let _ = client.kill(id, &pid.to_string(), "SIGKILL").await;
    }
}

/// Passes output through until the program ends. Returns its exit code, and the reason of an end
/// other than by exit.
async fn pass_output(
    receiver: &mut Receiver,
    started: &Cell<Option<u32>>,
) -> anyhow::Result<(i32, Option<String>)> {
    let mut stdout = tokio::io::stdout();
    let mut stderr = tokio::io::stderr();
    while let Some(event) = receiver.next().await? {
        match event {
            Event::Started { pid } => started.set(Some(pid)),
            Event::Stdout(bytes) => write(&mut stdout, &bytes).await?,
            Event::Stderr(bytes) => write(&mut stderr, &bytes).await?,
            Event::Exit { code, error } => return Ok((code, error)),
        }
    }
    bail!("the server closed the stream before the command ended");
}

async fn write(out: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> std::io::Result<()> {
    out.write_all(bytes).await?;
    out.flush().await
}

/// Passes input and its end to the program if `wanted`; then waits forever. Fails only if standard
/// input cannot be read.
async fn pass_input(sender: &mut Sender, wanted: bool) -> anyhow::Result<Infallible> {
    let mut stdin = tokio::io::stdin();
    let mut chunk = vec![0; INPUT_CHUNK_BYTES];
    if !wanted {
        return std::future::pending().await;
    }
    loop {
        let len = stdin
            .read(&mut chunk)
            .await
            .context("failed to read standard input")?;
        let sent = if len == 0 {
            sender.close_input().await
        } else {
            sender.input(&chunk[..len]).await
        };
        // A program that does not accept input has ended or is about to; the output half reports
        // the result.
        if len == 0 || sent.is_err() {
            break;
        }
    }
    std::future::pending().await
}

/// Returns the exit code that a shell would report for a program in a sandbox. Prints the reason of
/// an end other than by exit.
pub(crate) fn exit_code(code: i32, error: Option<&str>) -> i32 {
    match error {
        Some(error) if code < 0 => {
            output::error(format_args!(
                "wrenn: the command did not exit normally: {}",
                output::printable(error)
            ));
            signal_number(error).map_or(EXIT_UNKNOWN, |signal| 128 + signal)
        }
        _ if code < 0 => EXIT_UNKNOWN,
        _ => code,
    }
}

/// Returns the signal number for the guest agent's text, such as `signal: killed`.
fn signal_number(error: &str) -> Option<i32> {
    let name = error.split_once("signal: ")?.1;
    let name = name.strip_suffix(" (core dumped)").unwrap_or(name);
    let number = match name {
        "hangup" => 1,
        "interrupt" => 2,
        "quit" => 3,
        "illegal instruction" => 4,
        "trace/breakpoint trap" => 5,
        "aborted" => 6,
        "bus error" => 7,
        "floating point exception" => 8,
        "killed" => 9,
        "user defined signal 1" => 10,
        "segmentation fault" => 11,
        "user defined signal 2" => 12,
        "broken pipe" => 13,
        "alarm clock" => 14,
        "terminated" => 15,
        other => other.strip_prefix("signal ")?.parse().ok()?,
    };
    Some(number)
}

/// Parses `NAME=VALUE`.
pub(crate) fn env_pair(s: &str) -> Result<(String, String), String> {
    match s.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_returned_and_signals_map_as_in_a_shell() {
        assert_eq!(exit_code(0, None), 0);
        assert_eq!(exit_code(42, None), 42);
        assert_eq!(exit_code(-1, Some("signal: killed")), 137);
        assert_eq!(exit_code(-1, Some("signal: terminated")), 143);
        assert_eq!(exit_code(-1, Some("signal: signal 31")), 159);
        assert_eq!(exit_code(-1, Some("signal: user defined signal 1")), 138);
        let dumped = "signal: segmentation fault (core dumped)";
        assert_eq!(exit_code(-1, Some(dumped)), 139);
        assert_eq!(exit_code(-1, Some("who knows")), EXIT_UNKNOWN);
        assert_eq!(exit_code(-1, None), EXIT_UNKNOWN);
    }

    #[test]
    fn variable_is_split_at_the_first_equals_sign() {
        assert_eq!(env_pair("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(env_pair("A="), Ok(("A".into(), String::new())));
        assert!(env_pair("A").is_err());
        assert!(env_pair("=b").is_err());
    }
}
