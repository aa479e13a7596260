//! The processor's time stamp counter.

use std::{
    arch::x86_64::_rdtsc,
    thread::sleep,
    time::{Duration, Instant},
};

/// How long the counter is compared with the system's clock. The error is that of two readings, some 100 ns, in this.
const WINDOW: Duration = Duration::from_millis(50);

/// Readings of which the closest is taken: the thread may be interrupted between the two of one.
const READINGS: usize = 10;

/// How fast the counter counts, kHz. Takes 50 ms.
#[must_use]
pub fn frequency_khz() -> u32 {
    let (from, first) = reading();
    sleep(WINDOW);
    let (to, last) = reading();
    let nanos = to.duration_since(from).as_nanos().max(1);
    let khz = u128::from(last.wrapping_sub(first)) * 1_000_000 / nanos;
    u32::try_from(khz).unwrap_or(u32::MAX)
}

/// A moment, and the counter then.
fn reading() -> (Instant, u64) {
    let readings = (0..READINGS).map(|_| {
        let before = Instant::now();
        // SAFETY: every x86-64 processor has the instruction; Linux lets user space use it unless a process forbids it to itself
        // (prctl PR_SET_TSC), which none of ours does.
        let ticks = unsafe { _rdtsc() };
        (before.elapsed(), before, ticks)
    });
    let best = readings.min_by_key(|(took, ..)| *took);
    best.map_or_else(
        || (Instant::now(), 0),
        |(took, at, ticks)| (at + took / 2, ticks),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let (one, two) = (frequency_khz(), frequency_khz());
        assert!(one > 100_000, "{one} kHz");
        assert!(one.abs_diff(two) < one / 500, "{one} and {two} kHz");
    }
}
