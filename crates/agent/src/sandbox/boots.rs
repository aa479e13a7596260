//! Boots of kernels on this host: how many run at once, and how many there were.

use std::sync::atomic::AtomicU64;

use tokio::sync::{Semaphore, SemaphorePermit};

/// Policy for boots from disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootPolicy {
    /// Attempts until a boot that makes no progress fails.
    pub attempts: u32,
    /// Error in the kernel's calibration of its timer that the first attempt tolerates, in
    /// percent. Each further attempt tolerates twice as much.
    pub timer_tolerance_percent: u32,
}

impl Default for BootPolicy {
    fn default() -> Self {
        Self {
            attempts: 2,
            timer_tolerance_percent: 100,
        }
    }
}

impl BootPolicy {
    /// Policy for a guest that many others are restored from: they inherit its timer.
    pub(crate) const fn precise() -> Self {
        Self {
            attempts: 6,
            timer_tolerance_percent: 2,
        }
    }

    /// Tolerance of an attempt, counted from 0, in percent.
    pub(super) fn tolerance_percent(self, attempt: u32) -> u32 {
        let factor = 1_u32.checked_shl(attempt).unwrap_or(u32::MAX);
        self.timer_tolerance_percent.saturating_mul(factor)
    }
}

/// Boots of one agent.
#[derive(Debug)]
pub(crate) struct Boots {
    /// One permit per processor: a kernel that calibrates its timer needs one for itself.
    gate: Semaphore,
    /// Boots from disk that began.
    pub(crate) started: AtomicU64,
    /// Attempts after the first of such a boot.
    pub(crate) retried: AtomicU64,
    /// Boots whose last attempt made no progress.
    pub(crate) stalled: AtomicU64,
}

impl Boots {
    /// Boots of a host with this many processors.
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
        let tolerances: Vec<_> = (0..policy.attempts)
            .map(|attempt| policy.tolerance_percent(attempt))
            .collect();
        assert_eq!(tolerances, [2, 4, 8, 16, 32, 64]);
        assert_eq!(policy.tolerance_percent(99), u32::MAX);
    }
}
