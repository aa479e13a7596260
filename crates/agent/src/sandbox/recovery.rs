//! Recovery of a guest that was prepared for a snapshot and keeps running.
//!
//! The agent notifies the guest with `/snapshot/recover`. Until then, the guest's port forwarder
//! and metrics stay suspended. A guest that does not answer at once is notified again until it
//! answers or its VM is gone.

use std::time::Duration;

use thiserror_ext::AsReport as _;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use wrenn_envd_client::{EnvdClient, Recover};

use super::Running;

/// Interval between two attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// Task that repeats the notification. Dropping it aborts the task, because a late notification
/// would undo the next preparation.
pub(super) struct Recovery(JoinHandle<()>);

impl Drop for Recovery {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Notifies the guest that it continues as the same sandbox. If the guest does not answer, returns
/// the task that repeats the notification.
pub(super) async fn recover(running: &Running) -> Option<Recovery> {
    if notified(&running.envd).await {
        return None;
    }
    let again = repeat_recover(running.envd.clone(), running.gone.clone());
    Some(Recovery(tokio::spawn(again)))
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

async fn repeat_recover(envd: EnvdClient, gone: CancellationToken) {
    let asking = async {
        loop {
            tokio::time::sleep(PAUSE).await;
            if notified(&envd).await {
                tracing::info!("guest recovered");
                return;
            }
        }
    };
    tokio::select! {
        () = asking => {}
        () = gone.cancelled() => {}
    }
}
