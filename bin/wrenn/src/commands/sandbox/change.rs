//! `wrenn sandbox pause`, `resume`, `fork` and `adopt`.

use clap::Args;
use wrenn_api_types::{ForkSandbox, ResumeSandbox};
use wrenn_model::SandboxId;

use crate::{
    client::{Client, ClientError},
    output::{self, in_full},
};

/// Arguments of commands for several sandboxes.
#[derive(Debug, Args)]
pub(crate) struct ManyArgs {
    /// Ids of the sandboxes
    #[arg(required = true)]
    ids: Vec<SandboxId>,
}

/// Arguments of `wrenn sandbox resume`.
#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    #[command(flatten)]
    sandboxes: ManyArgs,
    /// Boot from the disk instead of restoring the memory
    #[arg(long)]
    disk_only: bool,
}

/// Arguments of `wrenn sandbox fork`.
#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    /// Sandbox id
    id: SandboxId,
    /// Number of copies
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1)]
    count: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Pauses all named sandboxes in order, continuing after failures.
pub(crate) async fn pause(client: &Client, args: ManyArgs) -> anyhow::Result<i32> {
    change_all(args, "pause", async |id| client.pause(id).await.map(drop)).await
}

/// Resumes all named sandboxes in order, continuing after failures.
pub(crate) async fn resume(client: &Client, args: ResumeArgs) -> anyhow::Result<i32> {
    let body = ResumeSandbox {
        memory: args.disk_only.then_some(false),
    };
    change_all(args.sandboxes, "resume", async |id| {
        client.resume(id, &body).await.map(drop)
    })
    .await
}

/// Adopts all named sandboxes in order, continuing after failures.
pub(crate) async fn adopt(client: &Client, args: ManyArgs) -> anyhow::Result<i32> {
    change_all(args, "adopt", async |id| client.adopt(id).await.map(drop)).await
}

async fn change_all(
    args: ManyArgs,
    action: &str,
    act: impl AsyncFn(&SandboxId) -> Result<(), ClientError>,
) -> anyhow::Result<i32> {
    let mut code = 0;
    for id in &args.ids {
        match act(id).await {
            Ok(()) => output::line(id)?,
            Err(error) => {
                output::error(format_args!(
                    "wrenn: failed to {action} {id}: {}",
                    in_full(&error)
                ));
                code = 1;
            }
        }
    }
    Ok(code)
}

/// Creates copies and prints their ids.
pub(crate) async fn fork(client: &Client, args: ForkArgs) -> anyhow::Result<i32> {
    let body = ForkSandbox {
        count: Some(args.count.into()),
    };
    let copies = client.fork(&args.id, &body).await?;
    if args.json {
        output::json(&copies)?;
    } else {
        for copy in &copies {
            output::line(&copy.id)?;
        }
    }
    Ok(0)
}
