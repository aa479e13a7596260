//! Time as stored in the database: milliseconds since the Unix epoch. And its steps.
//!
//! Rows and clients have times of the wall clock. This clock may be set to another time while the
//! process runs. Durations are therefore measured by the monotonic clock:
//! `lifecycle::deadline` and `lifecycle::idle_time` convert the times of a row when they first see them.
//! The next process takes the times of the rows as they are.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use tokio::time::Instant;

/// Smallest difference that counts as a step. Below it, the clock is being corrected gradually.
const MIN_STEP_MS: i64 = 1000;

/// Steps that a test has made, in milliseconds.
#[cfg(debug_assertions)]
static STEPPED_MS: std::sync::atomic::AtomicI64 = std::sync::atomic::AtomicI64::new(0);

/// Sets the wall clock of this process forward, or back. In development builds only.
#[cfg(debug_assertions)]
pub fn step(ms: i64) {
    STEPPED_MS.fetch_add(ms, std::sync::atomic::Ordering::SeqCst);
}

#[cfg(debug_assertions)]
fn stepped_ms() -> i64 {
    STEPPED_MS.load(std::sync::atomic::Ordering::SeqCst)
}

#[cfg(not(debug_assertions))]
const fn stepped_ms() -> i64 {
    0
}

/// Returns the current time. A clock before 1970 reads as 1970.
pub fn now_ms() -> i64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX));
    now.saturating_add(stepped_ms()).max(0)
}

/// Returns the time from one time of the wall clock to a later one; zero if it is not later.
pub(crate) fn between_ms(earlier_ms: i64, later_ms: i64) -> Duration {
    let ms = later_ms.saturating_sub(earlier_ms);
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

/// Converts a time for the API. A value out of range becomes 1970.
pub fn timestamp(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(ms).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// Converts a time for the API, where 0 means "never".
pub fn optional_timestamp(ms: i64) -> Option<Timestamp> {
    (ms > 0).then(|| timestamp(ms))
}

/// Detects steps of the wall clock: changes that the time that has passed does not explain.
#[derive(Debug)]
pub(crate) struct StepWatch {
    wall_ms: i64,
    at: Instant,
}

impl StepWatch {
    pub(crate) fn new() -> Self {
        Self {
            wall_ms: now_ms(),
            at: Instant::now(),
        }
    }

    /// Returns the step since the last look, in milliseconds. `None` if there was none.
    pub(crate) fn look(&mut self) -> Option<i64> {
        self.look_at(now_ms(), Instant::now())
    }

    fn look_at(&mut self, wall_ms: i64, at: Instant) -> Option<i64> {
        let passed = at.duration_since(self.at).as_millis();
        let expected = self
            .wall_ms
            .saturating_add(i64::try_from(passed).unwrap_or(i64::MAX));
        *self = Self { wall_ms, at };
        let step = wall_ms.saturating_sub(expected);
        (step.saturating_abs() >= MIN_STEP_MS).then_some(step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_is_detected_once() {
        let begun = Instant::now();
        let mut watch = StepWatch {
            wall_ms: 1_000_000,
            at: begun,
        };
        let after = |sec| begun + Duration::from_secs(sec);
        assert_eq!(watch.look_at(1_030_000, after(30)), None);
        // Gradual correction.
        assert_eq!(watch.look_at(1_060_900, after(60)), None);
        assert_eq!(watch.look_at(4_690_900, after(90)), Some(3_600_000));
        // Each step is reported once.
        assert_eq!(watch.look_at(4_691_900, after(91)), None);
        assert_eq!(watch.look_at(0, after(91)), Some(-4_691_900));
    }
}
