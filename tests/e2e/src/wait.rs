//! Waits for a condition, with a deadline, instead of for a fixed time.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep};

/// Deadline for an operation that takes one second on fast hardware, with software emulation on a
/// loaded machine.
pub const GENEROUS: Duration = Duration::from_secs(90);

/// Factor of all deadlines of this process.
static PATIENCE: AtomicU32 = AtomicU32::new(1);

/// Multiplies all later deadlines of this process, for guests that are slower than emulated ones.
pub fn set_patience(factor: u32) {
    PATIENCE.store(factor, Ordering::Relaxed);
}

/// Returns a duration multiplied by the factor of this process.
#[must_use]
pub fn patient(duration: Duration) -> Duration {
    duration * PATIENCE.load(Ordering::Relaxed)
}

/// Polls `ask` until it returns a value.
///
/// # Errors
/// No value within the deadline. The error contains `what`.
pub async fn until<T>(
    what: &str,
    deadline: Duration,
    mut ask: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = patient(deadline);
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
