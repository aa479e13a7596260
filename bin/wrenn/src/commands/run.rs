//! `wrenn run`: runs a command in a temporary sandbox.
//!
//! Owns the sandbox for its whole lifetime: in every case, including a signal, the sandbox is
//! destroyed before this program exits. If this program is killed with SIGKILL, the sandbox's short
//! idle timeout ends it.

use std::{convert::Infallible, time::Duration};

use clap::Args;
use wrenn_api_types::Sandbox;
use wrenn_model::{OnTimeout, SandboxId};

use super::{
    exec::{self, ProgramArgs},
    sandbox::{SpecArgs, id_of, wait_running},
};
use crate::{
    client::{Client, ClientError},
    interrupt::{Interrupted, Interrupts},
    output::{self, in_full},
};

/// Idle timeout of the sandbox, in seconds: the time for which it outlives this program after
/// SIGKILL.
const IDLE_SEC: u32 = 180;

/// Interval of keep-alive calls: a sandbox with a silent command is not idle.
const KEEP_ALIVE: Duration = Duration::from_secs(45);

/// Number of attempts to destroy the sandbox if the server is unreachable.
const DESTROY_TRIES: u32 = 3;

/// Delay between two attempts.
const DESTROY_PAUSE: Duration = Duration::from_secs(1);

/// Arguments of `wrenn run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    spec: SpecArgs,
    #[command(flatten)]
    program: ProgramArgs,
}

impl RunArgs {
    /// Returns the program and its arguments.
    #[cfg(test)]
    pub(crate) fn command(&self) -> &[String] {
        self.program.command()
    }
}

/// Creates a sandbox, runs the command in it, and destroys it. The command's exit code becomes that
/// of this process.
pub(crate) async fn run(client: &Client, args: RunArgs) -> anyhow::Result<i32> {
    let mut interrupts = Interrupts::new()?;
    let (sandbox, early) = create(client, &args.spec, &mut interrupts).await?;
    let id = id_of(&sandbox)?;
    let result = match early {
        Some(interrupted) => Ok(interrupted.exit_code()),
        None => use_it(client, sandbox, &args, &mut interrupts).await,
    };
    if let Err(error) = destroy(client, &id, &mut interrupts).await {
        output::error(format_args!(
            "wrenn: failed to destroy sandbox {id}: {error}; destroy it with `wrenn sandbox rm {id}`"
        ));
        return result.map(|code| if code == 0 { 1 } else { code });
    }
    result
}

/// Creates the sandbox. A signal does not end the wait: only the response names the sandbox to
/// destroy.
async fn create(
    client: &Client,
    spec: &SpecArgs,
    interrupts: &mut Interrupts,
) -> Result<(Sandbox, Option<Interrupted>), ClientError> {
    let mut body = spec.body(Some(IDLE_SEC));
    // No client would resume it.
    body.on_timeout = Some(OnTimeout::Kill);
    let answer = client.create(&body);
    tokio::pin!(answer);
    tokio::select! {
        made = &mut answer => Ok((made?, None)),
        interrupted = interrupts.recv() => Ok((answer.await?, Some(interrupted))),
    }
}

async fn use_it(
    client: &Client,
    sandbox: Sandbox,
    args: &RunArgs,
    interrupts: &mut Interrupts,
) -> anyhow::Result<i32> {
    let id = id_of(&sandbox)?;
    tokio::select! {
        ready = wait_running(client, sandbox) => ready.map(drop)?,
        interrupted = interrupts.recv() => return Ok(interrupted.exit_code()),
    }
    // The environment is set for the sandbox, so the command needs none of its own.
    let start = args.program.start(std::collections::BTreeMap::new());
    tokio::select! {
        ended = exec::stream(client, &id, &start, interrupts) => Ok(ended?.code()),
        never = keep_alive(client, &id) => match never {},
    }
}

async fn keep_alive(client: &Client, id: &SandboxId) -> Infallible {
    loop {
        tokio::time::sleep(KEEP_ALIVE).await;
        // If the failure matters, the stream fails too.
        let _ = client.ping(id).await;
    }
}

async fn destroy(
    client: &Client,
    id: &SandboxId,
    interrupts: &mut Interrupts,
) -> Result<(), String> {
    let tries = async {
        let mut tried = 1;
        loop {
            match client.destroy(id).await {
                Ok(()) => return Ok(()),
                Err(e) if e.is_not_found() => return Ok(()),
                Err(e) if tried == DESTROY_TRIES => return Err(in_full(&e)),
                Err(_) => tried += 1,
            }
            tokio::time::sleep(DESTROY_PAUSE).await;
        }
    };
    tokio::select! {
        done = tries => done,
        _ = interrupts.recv() => Err("interrupted again".to_owned()),
    }
}
