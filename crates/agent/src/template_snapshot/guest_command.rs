//! Commands that are run in a guest before its snapshot is taken.

use std::time::Duration;

use wrenn_envd_client::Exec;
use wrenn_proto::rpc::process::ProcessConfig;

use super::{TemplateSnapshotError, step_failed};
use crate::sandbox::Sandbox;

/// Maximum duration of a command.
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// Name of the step in errors.
const STEP: &str = "run a warm-up command in the guest";

/// User of a command.
#[derive(Debug, Clone, Copy)]
pub(super) enum User {
    /// Default user of the template.
    Default,
    Root,
}

/// Runs a command until it ends.
pub(super) async fn run_command(
    sandbox: &Sandbox,
    user: User,
    command: &[&str],
) -> Result<(), TemplateSnapshotError> {
    let (cmd, args) = command.split_first().unwrap_or((&"true", &[]));
    let exec = Exec {
        process: ProcessConfig {
            cmd: (*cmd).to_owned(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Default::default()
        },
        user: match user {
            User::Default => String::new(),
            User::Root => "root".to_owned(),
        },
        time_limit: Some(TIME_LIMIT),
        ..Default::default()
    };
    let running = sandbox.touch_running().map_err(step_failed(STEP))?;
    let ended = tokio::select! {
        biased;
        ended = running.envd.exec(exec) => ended.map_err(step_failed(STEP))?,
        // A guest that is gone never answers.
        () = running.gone.cancelled() => return Err(step_failed(STEP)(sandbox.unusable())),
    };
    if ended.exit_code != 0 {
        let stderr = String::from_utf8_lossy(&ended.stderr).into_owned();
        return Err(TemplateSnapshotError::Step {
            step: STEP,
            reason: format!("`{cmd}` exited with code {}: {stderr}", ended.exit_code),
        });
    }
    Ok(())
}
