//! The processor's time stamp counter (TSC).

use std::{
    arch::x86_64::_rdtsc,
    thread::sleep,
    time::{Duration, Instant},
};

/// Period over which the counter is compared with the system's clock. The error is that of two
/// readings, about 100 ns, per period.
const WINDOW: Duration = Duration::from_millis(50);

/// Number of readings of which the closest is used, because the thread may be interrupted between
/// the clock and the counter of one reading.
const READINGS: usize = 10;

/// Measures the frequency of the counter, in kHz. Takes 50 ms.
#[must_use]
pub fn frequency_khz() -> u32 {
    let (from, first) = reading();
    sleep(WINDOW);
    let (to, last) = reading();
    let nanos = to.duration_since(from).as_nanos().max(1);
    let khz = u128::from(last.wrapping_sub(first)) * 1_000_000 / nanos;
    u32::try_from(khz).unwrap_or(u32::MAX)
}

/// Returns a point in time and the counter's value at that time.
fn reading() -> (Instant, u64) {
    let readings = (0..READINGS).map(|_| {
        let before = Instant::now();
        // SAFETY: every x86-64 processor has the instruction. Linux allows it in user space unless
        // a process disables it for itself (prctl PR_SET_TSC), which no process of this project
        // does.
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
