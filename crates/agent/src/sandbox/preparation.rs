//! Preparation of a guest for a snapshot (`/snapshot/prepare`).
//!
//! The guest writes its dirty data to the disk first, which may take up to a minute on a slow disk.
//! The agent answers health checks meanwhile, so a guest that cannot prepare at all (a stopped
//! agent, a guest without a processor) is noticed within seconds.
//!
//! | guest                                     | result                                            |
//! |-------------------------------------------|---------------------------------------------------|
//! | prepares                                  | prepared                                          |
//! | rejects, or closes its port               | `Prepare`, at once                                |
//! | answers no health check                   | `GuestSilent`, after at most 11 s                 |
//! | answers health checks, and nothing else   | `Prepare`, after 60 s (`HOST_CALL_DEADLINE`)      |

use std::time::Duration;

use wrenn_envd_client::{EnvdClient, Prepare};

use super::error::LifecycleError;

/// Delay of each health check. Most preparations end before the first one.
const HEALTH_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum time for the answer to a health check. With eight emulated guests on two processors, an
/// answer takes up to two seconds.
const HEALTH_DEADLINE: Duration = Duration::from_secs(5);

/// Prepares the guest for a snapshot.
pub(super) async fn prepare(
    envd: &EnvdClient,
    snapshot: &Prepare<'_>,
) -> Result<(), LifecycleError> {
    tokio::select! {
        biased;
        prepared = envd.prepare(snapshot) => prepared.map_err(LifecycleError::Prepare),
        () = until_silent(envd) => Err(LifecycleError::GuestSilent),
    }
}

/// Waits until the guest agent fails two health checks in succession. A single one may fail on a
/// connection that the preparation closes.
async fn until_silent(envd: &EnvdClient) {
    loop {
        tokio::time::sleep(HEALTH_INTERVAL).await;
        if !envd.answers(HEALTH_DEADLINE).await && !envd.answers(HEALTH_DEADLINE).await {
            return;
        }
    }
}
