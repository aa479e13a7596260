//! Waiting for something to become true, with a deadline; never for time to pass.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep};

/// How long software emulation on a loaded machine may take for what takes a second elsewhere.
pub const GENEROUS: Duration = Duration::from_secs(90);

/// Asks again and again until there is an answer.
///
/// # Errors
/// If there is none in time; `what` is told.
pub async fn until<T>(
    what: &str,
    deadline: Duration,
    mut ask: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(answer) = ask().await? {
            return Ok(answer);
        }
        if Instant::now() > end {
            bail!("{what}: not within {deadline:?}");
        }
        sleep(Duration::from_millis(20)).await;
    }
}
