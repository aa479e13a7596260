//! `wrenn snapshot …`: named snapshots, from which sandboxes are created.

use clap::{Args, Subcommand};
use jiff::Timestamp;
use wrenn_api_types::{CreateSnapshot, Template};
use wrenn_model::{SandboxId, TemplateName};

use crate::{client::Client, output};

/// Commands of `wrenn snapshot`.
#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Create a snapshot of a sandbox as a template and print its name; a running sandbox keeps
    /// running
    Create(CreateArgs),
    /// List snapshots
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Remove snapshots
    Rm(RmArgs),
    /// Write a snapshot to the object store, under the same name
    Push(PushArgs),
    /// Take a snapshot from the object store, under the same name; its memory is loaded when
    /// sandboxes need it
    Pull(PullArgs),
}

/// Arguments of `wrenn snapshot create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Id of a running or paused sandbox
    sandbox: SandboxId,
    /// Name of the snapshot [default: generated]
    name: Option<TemplateName>,
    /// Replace an existing snapshot of this name
    #[arg(long)]
    overwrite: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `wrenn snapshot ls`.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `wrenn snapshot rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Names of the snapshots
    #[arg(required = true)]
    names: Vec<TemplateName>,
}

/// Arguments of `wrenn snapshot push`.
#[derive(Debug, Args)]
pub(crate) struct PushArgs {
    /// Name of the snapshot
    name: TemplateName,
}

/// Arguments of `wrenn snapshot pull`.
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Name of the snapshot
    name: TemplateName,
    /// Replace an existing snapshot of this name
    #[arg(long)]
    overwrite: bool,
}

/// Runs the command and returns the exit code.
pub(crate) async fn run(client: &Client, command: SnapshotCommand) -> anyhow::Result<i32> {
    match command {
        SnapshotCommand::Create(args) => {
            let body = CreateSnapshot {
                sandbox_id: args.sandbox.to_string(),
                name: args.name.map(Into::into),
            };
            let made = client.create_snapshot(&body, args.overwrite).await?;
            if args.json {
                output::json(&made)?;
            } else {
                output::line(&made.name)?;
            }
        }
        SnapshotCommand::Ls(args) => {
            let snapshots = client.snapshots().await?;
            if args.json {
                output::json(&snapshots)?;
            } else {
                let now = Timestamp::now();
                let rows = snapshots.iter().map(|s| row(s, now)).collect();
                output::table(
                    &[
                        "name",
                        "vcpus",
                        "memory",
                        "disk",
                        "generation",
                        "size",
                        "age",
                    ],
                    rows,
                )?;
            }
        }
        SnapshotCommand::Push(args) => {
            client.push_snapshot(&args.name).await?;
            output::line(&args.name)?;
        }
        SnapshotCommand::Pull(args) => {
            let pulled = client.pull_snapshot(&args.name, args.overwrite).await?;
            output::line(&pulled.name)?;
        }
        SnapshotCommand::Rm(args) => {
            for name in &args.names {
                client.delete_snapshot(name).await?;
                output::line(name)?;
            }
        }
    }
    Ok(0)
}

fn row(snapshot: &Template, now: Timestamp) -> Vec<String> {
    let known = |number: Option<u32>| number.map_or_else(|| "-".to_owned(), |n| n.to_string());
    vec![
        snapshot.name.clone(),
        known(snapshot.vcpus),
        format!("{} MiB", known(snapshot.memory_mb)),
        format!("{} MiB", known(snapshot.disk_size_mb)),
        known(snapshot.generation),
        indicatif::HumanBytes(snapshot.size_bytes).to_string(),
        output::age(snapshot.created_at, now),
    ]
}
