//! Recovery of a guest that was prepared for a snapshot and keeps running.
//!
//! The agent notifies the guest with `/snapshot/recover`. Until then, the guest's port forwarder
//! and metrics stay suspended. A guest that does not answer at once is notified again until it
//! answers or its VM is gone.

use std::time::Duration;

use thiserror_ext::AsReport as _;
use tokio::{sync::oneshot, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;
use wrenn_envd_client::{EnvdClient, Recover};

use super::Running;

/// Interval between two attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// Maximum time that the caller waits for the first attempt. A guest that answers does so within
/// milliseconds, and seconds if it is emulated on a busy host.
const FIRST_ATTEMPT: Duration = Duration::from_secs(5);

/// Task that repeats the notification. Dropping it aborts the task, because a late notification
/// would undo the next preparation.
pub(super) struct Recovery(JoinHandle<()>);

impl Drop for Recovery {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Notifies the guest that it continues as the same sandbox, and waits for the first attempt. The
/// returned task repeats the notification if that attempt fails.
pub(super) async fn recover(running: &Running) -> Recovery {
    let (recovery, tried) = begin(running);
    // A longer attempt continues in the task.
    let _ = tokio::time::timeout(FIRST_ATTEMPT, tried).await;
    recovery
}

/// Same as [`recover`], without waiting.
pub(super) fn recover_later(running: &Running) -> Recovery {
    begin(running).0
}

/// Starts the task. The receiver completes after the first attempt.
fn begin(running: &Running) -> (Recovery, oneshot::Receiver<()>) {
    let (first, tried) = oneshot::channel();
    let task = repeat_recover(running.envd.clone(), running.gone.clone(), first);
    (Recovery(tokio::spawn(task.in_current_span())), tried)
}

async fn notified(envd: &EnvdClient) -> bool {
    let recovered = envd.recover(&Recover::same()).await;
    recovered
        .inspect_err(|error| {
            tracing::warn!(
                error = error.to_report_string(),
                "failed to recover the guest from the snapshot"
            );
        })
        .is_ok()
}

async fn repeat_recover(envd: EnvdClient, gone: CancellationToken, first: oneshot::Sender<()>) {
    let asking = async {
        let mut is_done = notified(&envd).await;
        // The caller may have stopped waiting.
        let _ = first.send(());
        while !is_done {
            tokio::time::sleep(PAUSE).await;
            is_done = notified(&envd).await;
        }
    };
    tokio::select! {
        () = asking => {}
        () = gone.cancelled() => {}
    }
}
