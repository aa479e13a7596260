//! `wrenn sandbox …`: create, list, show and destroy. The other commands have their own files.

mod change;
mod logs;
mod show;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::{
    Args, Subcommand,
    builder::{PossibleValuesParser, TypedValueParser},
};
use futures::{StreamExt, stream};
use indicatif::ProgressBar;
use serde::Serialize;
use wrenn_api_types::{CreateSandbox, Sandbox};
use wrenn_model::{Egress, OnTimeout, SandboxId, SandboxStatus};

use super::{
    cp, exec,
    process::{self, KillArgs, OneArgs},
    shell,
};
use crate::{
    client::{Client, ClientError},
    output::{self, in_full},
};

/// Time within which a guest must boot. It takes seconds, or a minute in software emulation on a
/// busy machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);

/// Interval at which the status of a starting sandbox is queried.
const POLL: Duration = Duration::from_millis(150);

/// Number of sandboxes that are destroyed concurrently.
const DESTROY_AT_ONCE: usize = 8;

/// Commands of `wrenn sandbox`.
#[derive(Debug, Subcommand)]
pub(crate) enum SandboxCommand {
    /// Create a sandbox and print its id
    Create(CreateArgs),
    /// List sandboxes
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Show the details of a sandbox
    Get(OneArgs),
    /// Run a command in a sandbox; its output and exit code are passed through
    Exec(exec::ExecArgs),
    /// Open a terminal in a sandbox
    Shell(shell::ShellArgs),
    /// Copy a file to or from a sandbox
    Cp(cp::CpArgs),
    /// Pause sandboxes: save their state to disk and release their host resources
    Pause(change::ManyArgs),
    /// Resume paused sandboxes where they left off
    Resume(change::ResumeArgs),
    /// Create copies of a sandbox in its current state and print their ids
    Fork(change::ForkArgs),
    /// Destroy sandboxes
    Rm(RmArgs),
    /// Add sandboxes that exist on the host to the database (see `ls --unknown`)
    Adopt(change::ManyArgs),
    /// List the processes that were started in a sandbox
    Ps(OneArgs),
    /// Send a signal to a process in a sandbox
    Kill(KillArgs),
    /// Restart the idle timeout of a sandbox
    Ping(OneArgs),
    /// Show the log of a sandbox on its host, also of one that failed
    Logs(logs::LogsArgs),
    /// Show the CPU, memory and disk usage of a sandbox
    Metrics(OneArgs),
}

impl SandboxCommand {
    /// Checks constraints between arguments.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self {
            Self::Cp(args) => args.check(),
            _ => Ok(()),
        }
    }

    /// Runs the command and returns the exit code.
    pub(crate) async fn run(self, client: &Client) -> anyhow::Result<i32> {
        match self {
            Self::Create(args) => create(client, args).await,
            Self::Ls(args) => ls(client, args).await,
            Self::Get(args) => show::get(client, &args).await,
            Self::Exec(args) => exec::run(client, args).await,
            Self::Shell(args) => shell::run(client, args).await,
            Self::Cp(args) => cp::run(client, args).await,
            Self::Pause(args) => change::pause(client, args).await,
            Self::Resume(args) => change::resume(client, args).await,
            Self::Fork(args) => change::fork(client, args).await,
            Self::Rm(args) => rm(client, args).await,
            Self::Adopt(args) => change::adopt(client, args).await,
            Self::Ps(args) => process::ps(client, &args).await,
            Self::Kill(args) => process::kill(client, &args).await,
            Self::Ping(args) => process::ping(client, &args).await,
            Self::Logs(args) => logs::run(client, args).await,
            Self::Metrics(args) => process::metrics(client, &args).await,
        }
    }
}

/// Properties of a new sandbox.
#[derive(Debug, Clone, Args)]
pub(crate) struct SpecArgs {
    /// Template or snapshot to create the sandbox from [default: minimal]
    #[arg(short, long, value_name = "NAME")]
    template: Option<String>,
    /// Number of virtual CPUs [default: the template's]
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
    /// Memory in MiB [default: the template's]
    #[arg(short, long, value_name = "MIB")]
    memory: Option<u32>,
    /// Size of the disk in MiB, as the guest sees it
    #[arg(long, value_name = "MIB")]
    disk: Option<u32>,
    /// Network access beyond the host [default: the server's setting]
    #[arg(long, value_name = "POLICY", value_parser = egress_parser())]
    egress: Option<Egress>,
    /// Environment variable of every process in the sandbox (repeatable)
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = exec::env_pair)]
    env: Vec<(String, String)>,
}

/// Parses `allow` or `deny`.
pub(crate) fn egress_parser() -> impl TypedValueParser<Value = Egress> {
    PossibleValuesParser::new(["allow", "deny"]).try_map(|s| s.parse::<Egress>())
}

/// Parses `pause` or `kill`.
fn on_timeout_parser() -> impl TypedValueParser<Value = OnTimeout> {
    PossibleValuesParser::new(["pause", "kill"]).try_map(|s| s.parse::<OnTimeout>())
}

impl SpecArgs {
    /// Returns the request body.
    pub(crate) fn body(&self, timeout_sec: Option<u32>) -> CreateSandbox {
        let envs: BTreeMap<String, String> = self.env.iter().cloned().collect();
        CreateSandbox {
            template: self.template.clone(),
            vcpus: self.vcpus.map(Into::into),
            memory_mb: self.memory.map(Into::into),
            disk_size_mb: self.disk.map(Into::into),
            timeout_sec: timeout_sec.map(Into::into),
            egress: self.egress,
            envs: (!envs.is_empty()).then_some(envs),
            metadata: None,
            on_timeout: None,
            auto_resume: None,
        }
    }
}

/// Arguments of `wrenn sandbox create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    spec: SpecArgs,
    /// Idle timeout in seconds; 0: none [default: 300]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// Action when the idle timeout expires [default: pause]
    #[arg(long, value_name = "ACTION", value_parser = on_timeout_parser())]
    on_timeout: Option<OnTimeout>,
    /// Resume the sandbox automatically when it is used while paused
    #[arg(long)]
    auto_resume: bool,
    /// Metadata that is shown with the sandbox (repeatable)
    #[arg(long, value_name = "NAME=VALUE", value_parser = exec::env_pair)]
    metadata: Vec<(String, String)>,
    /// Do not wait until the sandbox runs
    #[arg(long)]
    no_wait: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

async fn create(client: &Client, args: CreateArgs) -> anyhow::Result<i32> {
    let mut body = args.spec.body(args.timeout);
    body.on_timeout = args.on_timeout;
    body.auto_resume = args.auto_resume.then_some(true);
    if !args.metadata.is_empty() {
        body.metadata = Some(args.metadata.into_iter().collect());
    }
    let mut sandbox = client.create(&body).await?;
    if !args.no_wait {
        sandbox = wait_running(client, sandbox).await?;
    }
    if args.json {
        output::json(&sandbox)?;
    } else {
        output::line(&sandbox.id)?;
    }
    Ok(0)
}

/// Returns the validated id of a sandbox in a response.
pub(crate) fn id_of(sandbox: &Sandbox) -> anyhow::Result<SandboxId> {
    sandbox
        .id
        .parse()
        .context("the server returned an invalid sandbox id")
}

/// Waits until a sandbox runs.
pub(crate) async fn wait_running(client: &Client, mut sandbox: Sandbox) -> anyhow::Result<Sandbox> {
    let id = id_of(&sandbox)?;
    let spinner = (sandbox.status != SandboxStatus::Running && output::stderr_is_terminal())
        .then(|| ProgressBar::new_spinner().with_message(format!("starting {id}")));
    if let Some(spinner) = &spinner {
        spinner.enable_steady_tick(Duration::from_millis(100));
    }
    let deadline = Instant::now() + BOOT_TIMEOUT;
    let ready = loop {
        match sandbox.status {
            SandboxStatus::Running => break Ok(sandbox),
            SandboxStatus::Pending | SandboxStatus::Starting | SandboxStatus::Resuming => {}
            SandboxStatus::Pausing | SandboxStatus::Paused => {
                break Err(anyhow::anyhow!(
                    "sandbox {id} was paused while it started; resume it with `wrenn sandbox resume {id}`"
                ));
            }
            SandboxStatus::Stopping | SandboxStatus::Stopped | SandboxStatus::Error => {
                let why = sandbox
                    .error
                    .unwrap_or_else(|| "it was destroyed".to_owned());
                break Err(anyhow::anyhow!("sandbox {id} failed to start: {why}"));
            }
        }
        if Instant::now() >= deadline {
            let seconds = BOOT_TIMEOUT.as_secs();
            break Err(anyhow::anyhow!(
                "sandbox {id} is not running after {seconds} s; check it with `wrenn sandbox get {id}`"
            ));
        }
        tokio::time::sleep(POLL).await;
        sandbox = client.get(&id).await?;
    };
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    ready
}

/// Arguments of `wrenn sandbox ls`.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Include destroyed sandboxes
    #[arg(short, long)]
    all: bool,
    /// List the sandboxes that exist on the host but are not in the database
    #[arg(long, conflicts_with = "all")]
    unknown: bool,
    /// Print only ids
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

async fn ls(client: &Client, args: LsArgs) -> anyhow::Result<i32> {
    if args.unknown {
        return ls_unknown(client, &args).await;
    }
    let statuses = if args.all {
        SandboxStatus::ALL.to_vec()
    } else {
        not_destroyed()
    };
    let sandboxes = client.list(&statuses).await?;
    print(&args, &sandboxes, |sandbox| &sandbox.id, show::list)
}

async fn ls_unknown(client: &Client, args: &LsArgs) -> anyhow::Result<i32> {
    let sandboxes = client.unknown().await?;
    print(args, &sandboxes, |sandbox| &sandbox.id, show::list_unknown)
}

/// Prints a list as JSON, as ids or as a table.
fn print<T: Serialize>(
    args: &LsArgs,
    sandboxes: &[T],
    id: impl Fn(&T) -> &str,
    table: impl FnOnce(&[T]) -> std::io::Result<()>,
) -> anyhow::Result<i32> {
    if args.json {
        output::json(&sandboxes)?;
    } else if args.quiet {
        for sandbox in sandboxes {
            output::line(id(sandbox))?;
        }
    } else {
        table(sandboxes)?;
    }
    Ok(0)
}

/// Returns all statuses but `stopped`. Lost sandboxes are included, because their users should
/// know.
fn not_destroyed() -> Vec<SandboxStatus> {
    let mut statuses = SandboxStatus::ALL.to_vec();
    statuses.retain(|status| *status != SandboxStatus::Stopped);
    statuses
}

/// Arguments of `wrenn sandbox rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Ids of the sandboxes
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    ids: Vec<SandboxId>,
    /// Destroy all sandboxes
    #[arg(long)]
    all: bool,
    /// Destroy sandboxes that exist on the host but are not in the database
    #[arg(long, conflicts_with = "all")]
    unknown: bool,
}

/// Destroys all named sandboxes, continuing after failures, and prints the ids of those that were
/// destroyed.
async fn rm(client: &Client, args: RmArgs) -> anyhow::Result<i32> {
    let ids = if args.all {
        client
            .list(&not_destroyed())
            .await?
            .iter()
            .map(id_of)
            .collect::<Result<_, _>>()?
    } else {
        args.ids
    };
    let unknown = args.unknown;
    let mut results = stream::iter(ids)
        .map(|id| async move {
            let result = if unknown {
                client.destroy_unknown(&id).await
            } else {
                client.destroy(&id).await
            };
            (id, result)
        })
        .buffer_unordered(DESTROY_AT_ONCE);
    let mut failed: Vec<(SandboxId, ClientError)> = Vec::new();
    while let Some((id, result)) = results.next().await {
        match result {
            Ok(()) => output::line(&id)?,
            Err(error) => failed.push((id, error)),
        }
    }
    match failed.as_slice() {
        [] => Ok(0),
        [(id, error)] => bail!("failed to destroy {id}: {}", in_full(error)),
        several => {
            for (id, error) in several {
                output::error(format_args!(
                    "wrenn: failed to destroy {id}: {}",
                    in_full(error)
                ));
            }
            Ok(1)
        }
    }
}
