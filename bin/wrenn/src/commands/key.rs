//! `wrenn key …`: API keys.

use std::str::FromStr as _;

use clap::{Args, Subcommand};
use jiff::Timestamp;
use wrenn_api_types::ApiKey;
use wrenn_model::{Scope, Scopes};

use crate::{client::Client, output};

/// Commands of `wrenn key`.
#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Create a key and print it; it cannot be shown again
    Create(CreateArgs),
    /// List keys, without their secrets
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Revoke keys, effective at once
    Rm(RmArgs),
}

/// Arguments of `wrenn key create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Name that describes the purpose of the key
    name: String,
    /// Create the key in the format that E2B clients expect
    #[arg(long)]
    e2b: bool,
    /// Scopes of the key: sandboxes, keys, hosts [default: those of your own key]
    #[arg(long, value_delimiter = ',', value_parser = Scope::from_str)]
    scopes: Option<Vec<Scope>>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `wrenn key ls`.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `wrenn key rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Ids of the keys, as shown by `wrenn key ls`
    #[arg(required = true)]
    ids: Vec<String>,
}

/// Runs the command and returns the exit code.
pub(crate) async fn run(client: &Client, command: KeyCommand) -> anyhow::Result<i32> {
    match command {
        KeyCommand::Create(args) => {
            let made = client.create_key(args.name, args.e2b, args.scopes).await?;
            if args.json {
                output::json(&made)?;
            } else {
                output::line(&made.key)?;
            }
        }
        KeyCommand::Ls(args) => {
            let keys = client.keys().await?;
            if args.json {
                output::json(&keys)?;
            } else {
                let now = Timestamp::now();
                let rows = keys.iter().map(|key| row(key, now)).collect();
                output::table(&["id", "name", "key", "scopes", "age", "last used"], rows)?;
            }
        }
        KeyCommand::Rm(args) => {
            for id in &args.ids {
                client.delete_key(id).await?;
                output::line(id)?;
            }
        }
    }
    Ok(0)
}

fn row(key: &ApiKey, now: Timestamp) -> Vec<String> {
    let used = key
        .last_used_at
        .map(|at| format!("{} ago", output::age(at, now)));
    vec![
        key.id.clone(),
        output::printable(&key.name),
        format!("{}…", key.prefix),
        Scopes::from_iter(key.scopes.iter().copied()).to_string(),
        output::age(key.created_at, now),
        used.unwrap_or_else(|| "never".to_owned()),
    ]
}
