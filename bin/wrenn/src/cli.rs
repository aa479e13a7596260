//! Command line: all commands, and the runtime that each one uses.

use std::{future::Future, path::PathBuf};

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand, error::ErrorKind};

use crate::{
    client::Client,
    commands::{completions, doctor, image, key, run, sandbox, serve, snapshot},
    config::{self, Layer, Settings},
};

/// Self-hosted microVM sandboxes: every sandbox is a virtual machine with its own kernel
#[derive(Debug, Parser)]
#[command(
    name = "wrenn",
    version,
    disable_help_subcommand = true,
    after_help = "Settings are taken from flags, then environment variables, then one file \
        (--config, WRENN_CONFIG, /etc/wrenn.toml, or wrenn.toml in the data directory), then defaults."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: CliCommand,
}

/// Settings of all commands.
#[derive(Debug, Args)]
#[command(next_help_heading = "Settings")]
struct Globals {
    /// Settings file [env: WRENN_CONFIG]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Data directory [env: WRENN_DIR] [default: /var/lib/wrenn]
    #[arg(long, global = true, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// URL of the REST API [env: WRENN_API_URL] [default: http://127.0.0.1:8000]
    #[arg(long, global = true, value_name = "URL")]
    api_url: Option<String>,
    /// API key [env: WRENN_API_KEY] [default: content of `api-key` in the data directory]
    #[arg(long, global = true, value_name = "KEY")]
    api_key: Option<String>,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Run the control plane and the host agent on this machine, in one process
    Up(serve::UpArgs),
    /// Run the control plane only: REST API, database, reconciler
    Server(serve::ServerArgs),
    /// Run the host agent only: the service that runs sandboxes on this machine
    Agent(serve::AgentArgs),
    /// Check this machine and print commands that fix the problems found
    Doctor(doctor::DoctorArgs),
    /// Run a command in a temporary sandbox
    ///
    /// The exit code is that of the command; 128 and the number of the signal that ended it; 127 if
    /// its program does not exist; 126 if the program cannot be executed; 1 for other failures.
    Run(run::RunArgs),
    /// Create and use sandboxes
    #[command(subcommand, visible_alias = "sb")]
    Sandbox(sandbox::SandboxCommand),
    /// Create, list and remove snapshots of sandboxes
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Build, list and remove templates
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Create, list and revoke API keys
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// Print a shell completion script
    Completions(completions::CompletionsArgs),
}

impl Cli {
    /// Checks constraints between arguments, which the parser cannot express.
    pub(crate) fn checked(self) -> Result<Self, clap::Error> {
        let checked = match &self.command {
            CliCommand::Sandbox(command) => command.check(),
            _ => Ok(()),
        };
        checked.map_err(|why| Self::command().error(ErrorKind::ValueValidation, why))?;
        Ok(self)
    }

    /// Runs the command and returns the exit code.
    pub(crate) fn run(self) -> anyhow::Result<i32> {
        if let CliCommand::Completions(args) = &self.command {
            return completions::run(args);
        }
        let mut flags = Layer {
            dir: self.globals.dir,
            api_url: self.globals.api_url,
            api_key: self.globals.api_key,
            ..Layer::default()
        };
        match &self.command {
            CliCommand::Up(args) => args.settings(&mut flags),
            CliCommand::Server(args) => args.settings(&mut flags),
            CliCommand::Agent(args) => args.settings(&mut flags),
            CliCommand::Image(command) => command.settings(&mut flags),
            _ => {}
        }
        let settings = config::load(flags, self.globals.config.as_deref(), |name| {
            std::env::var(name).ok()
        })?;
        self.command.run(&settings)
    }
}

impl CliCommand {
    fn run(self, settings: &Settings) -> anyhow::Result<i32> {
        match self {
            Self::Up(args) => on_all_cores(serve::up(settings, args)),
            Self::Server(args) => on_all_cores(serve::server(settings, args)),
            Self::Agent(args) => on_all_cores(serve::agent(settings, args)),
            Self::Doctor(args) => doctor::run(settings, args),
            Self::Image(command) => image::run(settings, command),
            Self::Run(args) => {
                let client = Client::new(settings)?;
                on_one_core(run::run(&client, args))
            }
            Self::Sandbox(command) => {
                let client = Client::new(settings)?;
                on_one_core(command.run(&client))
            }
            Self::Snapshot(command) => {
                let client = Client::new(settings)?;
                on_one_core(snapshot::run(&client, command))
            }
            Self::Key(command) => {
                let client = Client::new(settings)?;
                on_one_core(key::run(&client, command))
            }
            Self::Completions(args) => completions::run(&args),
        }
    }
}

/// Runs a client command on the current thread: it waits for one thing at a time.
fn on_one_core(work: impl Future<Output = anyhow::Result<i32>>) -> anyhow::Result<i32> {
    block_on(&mut tokio::runtime::Builder::new_current_thread(), work)
}

fn on_all_cores(work: impl Future<Output = anyhow::Result<i32>>) -> anyhow::Result<i32> {
    block_on(&mut tokio::runtime::Builder::new_multi_thread(), work)
}

fn block_on(
    builder: &mut tokio::runtime::Builder,
    work: impl Future<Output = anyhow::Result<i32>>,
) -> anyhow::Result<i32> {
    let runtime = builder
        .enable_all()
        .build()
        .context("failed to start the async runtime")?;
    let result = runtime.block_on(work);
    // A thread that reads the terminal cannot be stopped; do not wait for the next key.
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))?.checked()
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_keeps_its_own_flags() {
        for line in [
            "wrenn run -- ls -l --json",
            "wrenn run ls -l --json",
            "wrenn run --template t ls -l --json",
        ] {
            let CliCommand::Run(args) = parse(line).expect(line).command else {
                panic!("{line}");
            };
            assert_eq!(args.command(), ["ls", "-l", "--json"], "{line}");
        }
    }

    #[test]
    fn settings_are_accepted_before_and_after_the_command() {
        for line in ["wrenn --dir /d doctor", "wrenn doctor --dir /d"] {
            let cli = parse(line).expect(line);
            assert_eq!(cli.globals.dir, Some("/d".into()), "{line}");
        }
    }

    #[test]
    fn invalid_command_lines_are_rejected() {
        for line in [
            "wrenn",
            "wrenn fly",
            "wrenn run",
            "wrenn run --env NAME -- true",
            "wrenn run --egress maybe -- true",
            "wrenn up --listen 8000",
            "wrenn sandbox get nonsense",
            "wrenn sandbox get ../etc",
            "wrenn sandbox rm",
            "wrenn sandbox cp a b",
            "wrenn sandbox cp sb-1:/a sb-2:/b",
            "wrenn completions cobol",
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
