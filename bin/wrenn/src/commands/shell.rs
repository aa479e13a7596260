//! `wrenn sandbox shell`: connects this terminal to a terminal in a sandbox.

mod raw;

use std::{collections::BTreeMap, convert::Infallible};

use anyhow::bail;
use clap::Args;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    signal::unix::{Signal, SignalKind, signal},
};
use wrenn_model::SandboxId;

use self::raw::RawTerminal;
use super::exec::{self, env_pair};
use crate::{
    client::{Client, Event, Receiver, Sender, Start, StreamKind},
    interrupt::Interrupts,
};

/// Maximum size of the chunks in which keys are sent, in bytes; reached mostly by pastes.
const INPUT_CHUNK_BYTES: usize = 4096;

/// Arguments of `wrenn sandbox shell`.
#[derive(Debug, Args)]
pub(crate) struct ShellArgs {
    /// Sandbox id
    id: SandboxId,
    /// User to run as [default: the template's]
    #[arg(short, long, value_name = "NAME")]
    user: Option<String>,
    /// Working directory [default: the user's home]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Environment variable of the shell (repeatable)
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = env_pair)]
    env: Vec<(String, String)>,
    /// Command to run [default: /bin/bash]
    #[arg(trailing_var_arg = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Opens the terminal; the shell's exit code becomes that of this process.
pub(crate) async fn run(client: &Client, args: ShellArgs) -> anyhow::Result<i32> {
    if !raw::is_terminal() {
        bail!(
            "`wrenn sandbox shell` requires a terminal; without one, use `wrenn sandbox exec -i {} -- COMMAND`",
            args.id
        );
    }
    let mut interrupts = Interrupts::new()?;
    let resized = signal(SignalKind::window_change())?;
    let (cols, rows) = raw::size();
    let start = start(args.user, args.workdir, args.env, &args.command, cols, rows);
    let socket = client.open(&args.id, StreamKind::Pty, &start).await?;
    let (mut sender, mut receiver) = (socket.sender, socket.receiver);
    let terminal = RawTerminal::enter()?;
    let ended = tokio::select! {
        ended = show(&mut receiver) => ended,
        broken = send(&mut sender, resized) => match broken { Err(error) => Err(error), Ok(never) => match never {} },
        interrupted = interrupts.recv() => Ok((interrupted.exit_code(), None)),
    };
    // Restored before anything is printed: on a raw terminal a new line does not start at the first
    // column.
    drop(terminal);
    let (code, error) = ended?;
    Ok(exec::exit_code(code, error.as_deref()))
}

fn start(
    user: Option<String>,
    workdir: Option<String>,
    env: Vec<(String, String)>,
    command: &[String],
    cols: u16,
    rows: u16,
) -> Start {
    let mut envs: BTreeMap<String, String> = env.into_iter().collect();
    if let Ok(term) = std::env::var("TERM") {
        envs.entry("TERM".to_owned()).or_insert(term);
    }
    let (cmd, args) = match command.split_first() {
        Some((cmd, args)) => (cmd.clone(), args.to_vec()),
        None => Default::default(),
    };
    Start {
        cmd,
        args,
        envs,
        cwd: workdir,
        user,
        cols: Some(cols),
        rows: Some(rows),
        ..Start::default()
    }
}

/// Shows the output of the sandbox's terminal until its program ends.
async fn show(receiver: &mut Receiver) -> anyhow::Result<(i32, Option<String>)> {
    let mut stdout = tokio::io::stdout();
    while let Some(event) = receiver.next().await? {
        match event {
            Event::Started { .. } => {}
            Event::Stdout(bytes) | Event::Stderr(bytes) => {
                stdout.write_all(&bytes).await?;
                stdout.flush().await?;
            }
            Event::Exit { code, error } => return Ok((code, error)),
        }
    }
    bail!("the server closed the terminal");
}

/// Sends keys and terminal sizes until the stream fails.
async fn send(sender: &mut Sender, mut resized: Signal) -> anyhow::Result<Infallible> {
    let mut stdin = tokio::io::stdin();
    let mut keys = vec![0; INPUT_CHUNK_BYTES];
    let mut open = true;
    loop {
        tokio::select! {
            len = stdin.read(&mut keys), if open => match len? {
                // The terminal is gone; the program in the sandbox may still end on its own.
                0 => open = false,
                len => sender.input(&keys[..len]).await?,
            },
            _ = resized.recv() => {
                let (cols, rows) = raw::size();
                sender.resize(cols, rows).await?;
            }
        }
    }
}
