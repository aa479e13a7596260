//! Applies packet filter rules and reads them back, with the program `nft`.
//!
//! Each call is one transaction by one process, in the network namespace of the calling thread.

use std::{io, process::Stdio, time::Duration};

use serde_json::Value;
use tokio::{io::AsyncWriteExt as _, process::Command};

/// Maximum run time of one `nft` process. A typical run takes about 10 ms.
const DEADLINE: Duration = Duration::from_secs(15);

/// Failure to apply or to read rules.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RulesError {
    /// `nft` could not be started, or writing to it failed.
    #[error("failed to run `nft` (package nftables)")]
    Run(#[source] io::Error),
    /// `nft` rejected the rules.
    #[error("`nft` rejected the rules: {0}")]
    Refused(String),
    /// `nft` did not finish in time.
    #[error("`nft` timed out after {DEADLINE:?}")]
    Deadline,
    /// The output of `nft` cannot be parsed.
    #[error("failed to parse the rules that `nft` printed")]
    Malformed(#[source] serde_json::Error),
}

/// Applies rules.
pub(super) async fn apply(rules: &str) -> Result<(), RulesError> {
    run(&["-f", "-"], rules).await.map(drop)
}

/// Returns the host's table as `nft -j` prints it, or `None` if it does not exist.
pub(super) async fn host_table() -> Result<Option<Value>, RulesError> {
    match run(&["-j", "list", "table", "inet", "wrenn"], "").await {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(RulesError::Malformed),
        Err(RulesError::Refused(reason)) if reason.contains("No such file") => Ok(None),
        Err(error) => Err(error),
    }
}

async fn run(args: &[&str], input: &str) -> Result<Vec<u8>, RulesError> {
    let mut child = Command::new("nft")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(RulesError::Run)?;
    let mut stdin = child.stdin.take();
    let run = async {
        if let Some(mut stdin) = stdin.take() {
            stdin.write_all(input.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(DEADLINE, run)
        .await
        .map_err(|_| RulesError::Deadline)?
        .map_err(RulesError::Run)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(RulesError::Refused(text.trim().chars().take(500).collect()))
}
