//! Commands that are run in a guest before its snapshot is taken.

use std::time::Duration;

use connectrpc::ConnectError;
use wrenn_model::limits::MAX_EXEC_OUTPUT_BYTES;
use wrenn_proto::rpc::process::{
    __buffa::oneof::{process_event::Event, process_event::data_event::Output},
    ProcessConfig, StartRequest,
};

use super::{TemplateSnapshotError, step_failed};
use crate::{
    envd_client::{EnvdClient, StartStream},
    sandbox::Sandbox,
};

/// Maximum duration of a command.
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// Grace period beyond the time limit of a command, for its end to be reported.
const END_GRACE: Duration = Duration::from_secs(15);

/// Name of the step in errors.
const STEP: &str = "run a warm-up command in the guest";

/// Command that has ended.
struct Ended {
    exit_code: i32,
    stderr: Vec<u8>,
}

/// Runs a command as the template's default user until it ends.
pub(super) async fn run_command(
    sandbox: &Sandbox,
    command: &[&str],
) -> Result<(), TemplateSnapshotError> {
    let (cmd, args) = command.split_first().unwrap_or((&"true", &[]));
    let running = sandbox.touch_running().map_err(step_failed(STEP))?;
    let ended = tokio::select! {
        biased;
        ended = run(&running.envd, cmd, args) => ended,
        // A guest that is gone never answers.
        () = running.gone.cancelled() => {
            Err(ConnectError::unavailable(sandbox.unusable().to_string()))
        }
    };
    let ended = ended.map_err(step_failed(STEP))?;
    if ended.exit_code != 0 {
        let stderr = String::from_utf8_lossy(&ended.stderr).into_owned();
        return Err(TemplateSnapshotError::Step {
            step: STEP,
            reason: format!("`{cmd}` exited with code {}: {stderr}", ended.exit_code),
        });
    }
    Ok(())
}

async fn run(envd: &EnvdClient, cmd: &str, args: &[&str]) -> Result<Ended, ConnectError> {
    let request = StartRequest {
        process: ProcessConfig {
            cmd: cmd.to_owned(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Default::default()
        }
        .into(),
        // The command's input is at its end from the start. A command that reads it does not block.
        stdin: Some(false),
        ..Default::default()
    };
    let run = async {
        let events = envd.start(request, "", Some(TIME_LIMIT), false).await?;
        wait_for_end(events).await
    };
    // The guest normally enforces the time limit. This deadline covers a guest that does not.
    let ended = tokio::time::timeout(TIME_LIMIT + END_GRACE, run);
    ended.await.unwrap_or_else(|_| {
        Err(ConnectError::deadline_exceeded(format!(
            "the end of the command was not reported within {END_GRACE:?} after its time limit of {TIME_LIMIT:?}"
        )))
    })
}

async fn wait_for_end(mut events: StartStream) -> Result<Ended, ConnectError> {
    let mut stderr = Vec::new();
    while let Some(message) = events.message().await? {
        let event = message.to_owned_message().event.into_option();
        match event.and_then(|event| event.event) {
            Some(Event::Data(data)) => {
                if let Some(Output::Stderr(bytes)) = data.output {
                    let room = MAX_EXEC_OUTPUT_BYTES.saturating_sub(stderr.len());
                    stderr.extend_from_slice(bytes.get(..room).unwrap_or(&bytes));
                }
            }
            Some(Event::End(end)) => {
                let exit_code = end.exit_code;
                return Ok(Ended { exit_code, stderr });
            }
            Some(Event::Start(_) | Event::Keepalive(_)) | None => {}
        }
    }
    Err(ConnectError::unavailable(
        "the command's output ended before the command's exit was reported",
    ))
}
