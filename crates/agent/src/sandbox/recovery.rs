//! A guest that was made ready for a freeze and runs on is told so (`/snapshot/recover`); until it has heard, its port forwarder
//! and its metrics stand still. A guest that does not answer at once is asked again until it does, or its machine is gone.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Running, error::chain};
use crate::envd_client::{EnvdClient, Recover};

/// Between two attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// The task that asks. Dropping it ends it: the next preparation must not be undone by it.
pub(super) struct Recovery(JoinHandle<()>);

impl Drop for Recovery {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Tells the guest that it goes on as the sandbox that it was. If it does not answer: the task that tells it again.
pub(super) async fn recover(running: &Running) -> Option<Recovery> {
    if told(&running.envd).await {
        return None;
    }
    let again = ask_again(running.envd.clone(), running.gone.clone());
    Some(Recovery(tokio::spawn(again)))
}

async fn told(envd: &EnvdClient) -> bool {
    let recovered = envd.recover(&Recover::same()).await;
    recovered
        .inspect_err(|error| {
            tracing::warn!(
                error = chain(error),
                "the guest did not recover from its preparation"
            );
        })
        .is_ok()
}

async fn ask_again(envd: EnvdClient, gone: CancellationToken) {
    let asking = async {
        loop {
            tokio::time::sleep(PAUSE).await;
            if told(&envd).await {
                tracing::info!("the guest recovered");
                return;
            }
        }
    };
    tokio::select! {
        () = asking => {}
        () = gone.cancelled() => {}
    }
}
