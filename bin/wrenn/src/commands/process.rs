//! `wrenn sandbox ps|kill|ping|metrics`: small calls for one sandbox.

use clap::Args;
use wrenn_api_types::Metrics;
use wrenn_model::SandboxId;

use crate::{client::Client, output};

/// Arguments of a command for one sandbox.
#[derive(Debug, Args)]
pub(crate) struct OneArgs {
    /// Sandbox id
    pub(crate) id: SandboxId,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `wrenn sandbox kill`.
#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Sandbox id
    id: SandboxId,
    /// Process id in the guest, or tag
    process: String,
    /// Signal to send
    #[arg(short, long, default_value = "SIGTERM", value_name = "NAME")]
    signal: String,
}

/// Lists the processes that were started through the API.
pub(crate) async fn ps(client: &Client, args: &OneArgs) -> anyhow::Result<i32> {
    let list = client.processes(&args.id).await?;
    if args.json {
        output::json(&list)?;
        return Ok(0);
    }
    let rows = list
        .processes
        .iter()
        .map(|process| {
            let mut line = vec![process.cmd.clone()];
            line.extend_from_slice(&process.args);
            vec![
                process.pid.to_string(),
                output::printable(process.tag.as_deref().unwrap_or_default()),
                output::printable(&line.join(" ")),
            ]
        })
        .collect();
    output::table(&["pid", "tag", "command"], rows)?;
    Ok(0)
}

/// Sends a signal.
pub(crate) async fn kill(client: &Client, args: &KillArgs) -> anyhow::Result<i32> {
    let name = args.signal.to_ascii_uppercase();
    let signal = match name.strip_prefix("SIG") {
        Some(_) => name,
        None => format!("SIG{name}"),
    };
    client.kill(&args.id, &args.process, &signal).await?;
    Ok(0)
}

/// Restarts the idle timeout.
pub(crate) async fn ping(client: &Client, args: &OneArgs) -> anyhow::Result<i32> {
    client.ping(&args.id).await?;
    if args.json {
        output::json(&serde_json::json!({ "sandbox_id": args.id }))?;
    }
    Ok(0)
}

/// Shows the resource usage of the sandbox.
pub(crate) async fn metrics(client: &Client, args: &OneArgs) -> anyhow::Result<i32> {
    let metrics = client.metrics(&args.id).await?;
    if args.json {
        output::json(&metrics)?;
    } else {
        output::table(&["resource", "used", "total"], usage(&metrics))?;
    }
    Ok(0)
}

fn usage(metrics: &Metrics) -> Vec<Vec<String>> {
    let row = |name: &str, used: String, total: String| vec![name.to_owned(), used, total];
    vec![
        row(
            "cpu",
            format!("{:.1} %", metrics.cpu_pct),
            format!("{} vcpus", metrics.cpu_count),
        ),
        row(
            "memory",
            output::bytes(metrics.mem_bytes),
            output::bytes(metrics.mem_total_bytes),
        ),
        row(
            "disk",
            output::bytes(metrics.disk_bytes),
            output::bytes(metrics.disk_total_bytes),
        ),
    ]
}
