//! Boots of guest kernels on this host: limit of concurrent boots, retry policy, and counters.

use std::sync::atomic::AtomicU64;

use tokio::sync::{Semaphore, SemaphorePermit};

use super::Stall;

/// Policy for boots from disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootPolicy {
    /// Maximum number of attempts of a boot that makes no progress.
    pub attempts: u32,
    /// Maximum number of attempts of a boot that the guest's init rejects. Each costs little and
    /// is detected at once, and on a busy host the reason, a wrong calibration, is not rare.
    pub rejected_attempts: u32,
    /// Error of the kernel's timer calibration that the first attempt tolerates, in percent. Each
    /// further attempt tolerates twice as much.
    pub timer_tolerance_percent: u32,
}

impl Default for BootPolicy {
    fn default() -> Self {
        Self {
            attempts: 2,
            rejected_attempts: 5,
            timer_tolerance_percent: 100,
        }
    }
}

impl BootPolicy {
    /// Policy for a guest from which many others will be restored, because they inherit its timer.
    pub(crate) const fn precise() -> Self {
        Self {
            attempts: 2,
            rejected_attempts: 6,
            timer_tolerance_percent: 2,
        }
    }

    /// Returns the maximum number of attempts of a boot that ended like this.
    pub(super) const fn attempts_after(self, stall: &Stall) -> u32 {
        match stall {
            Stall::Reported(_) => self.rejected_attempts,
            Stall::Idle(_) | Stall::Spinning(_) => self.attempts,
        }
    }

    /// Returns the tolerance of an attempt, in percent. Attempts are counted from 0.
    pub(super) fn tolerance_percent(self, attempt: u32) -> u32 {
        let factor = 1_u32.checked_shl(attempt).unwrap_or(u32::MAX);
        self.timer_tolerance_percent.saturating_mul(factor)
    }
}

/// Boots of one agent.
#[derive(Debug)]
pub(crate) struct Boots {
    /// One permit per processor: a kernel that calibrates its timer needs a processor of its own.
    gate: Semaphore,
    /// Number of boots from disk that were started.
    pub(crate) started: AtomicU64,
    /// Number of attempts after the first attempt of a boot.
    pub(crate) retried: AtomicU64,
    /// Number of boots whose last attempt made no progress.
    pub(crate) stalled: AtomicU64,
}

impl Boots {
    /// Creates the limit and counters of a host with this many processors.
    pub(crate) fn new(cpus: usize) -> Self {
        Self {
            gate: Semaphore::new(cpus.max(1)),
            started: AtomicU64::default(),
            retried: AtomicU64::default(),
            stalled: AtomicU64::default(),
        }
    }

    /// Waits for permission to boot a kernel. `None` is never returned: the gate is never closed.
    pub(super) async fn enter(&self) -> Option<SemaphorePermit<'_>> {
        self.gate.acquire().await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_attempt_tolerates_twice_as_much() {
        let policy = BootPolicy::precise();
        let tolerances: Vec<_> = (0..policy.rejected_attempts)
            .map(|attempt| policy.tolerance_percent(attempt))
            .collect();
        assert_eq!(tolerances, [2, 4, 8, 16, 32, 64]);
        assert_eq!(policy.tolerance_percent(99), u32::MAX);
    }
}
