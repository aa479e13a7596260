//! Waits for a condition, with a deadline, instead of for a fixed time.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep};

/// Deadline for an operation that takes one second on fast hardware, with software emulation on a
/// loaded machine.
pub const GENEROUS: Duration = Duration::from_secs(90);

/// Polls `ask` until it returns a value.
///
/// # Errors
/// No value within the deadline. The error contains `what`.
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
            bail!("timed out after {deadline:?} waiting until {what}");
        }
        sleep(Duration::from_millis(20)).await;
    }
}
