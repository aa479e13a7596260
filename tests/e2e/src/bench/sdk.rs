//! Latency for users of E2B's Python SDK: runs `tests/e2b/python/bench.py` in a separate process.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{Service, sdks};

/// Measures commands and files of the SDK, through the traffic listener.
///
/// # Errors
/// The SDK is not installed, or the program fails.
pub async fn sdk(service: &Service) -> Result<Value> {
    let python = sdks::sdks().join(sdks::PYTHON).join("bin/python");
    let mut command = Command::new(python);
    command
        .args(["-B", "bench.py"])
        .current_dir(sdks::scenarios().join("python"))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    sdks::point_at(&mut command, service)?;
    let output = tokio::task::spawn_blocking(move || command.output())
        .await?
        .context("failed to start the SDK; run scripts/setup-sdks")?;
    ensure!(output.status.success(), "bench.py: {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}
