//! Detection of a boot that makes no progress.
//!
//! Wall-clock time alone is not sufficient: a guest on a busy host may wait minutes for a
//! processor. The watch therefore also uses the processor time of the VMM. The VMM of a hung guest
//! is idle: it neither runs nor waits for a processor. The VMM of a guest that spins uses far more
//! processor time than any boot.
//!
//! | observed since the last boot mark                         | verdict           |
//! |-----------------------------------------------------------|-------------------|
//! | `wrenn-init` reported a failure                           | stalled, at once  |
//! | a new mark: kernel up, starting envd                      | watch restarts    |
//! | the guest is paused because the host's disk is full       | watch restarts    |
//! | busy (running + waiting) below 10 % of the last 6 s       | stalled: idle     |
//! | over 60 s of processor time                               | stalled: spinning |
//! | the supervisor reports no processor time                  | no verdict        |
//!
//! No I/O, no clock: the caller passes each status and the time of the observation.

use std::time::Duration;

use tokio::time::Instant;
use wrenn_proto::supervise::{MachineStatus, VmmTime};

/// Time after which an idle guest is stalled. The longest idle phase of a good boot is the wait
/// for a disk read.
const IDLE_AFTER: Duration = Duration::from_secs(6);

/// Divisor of [`IDLE_AFTER`]: a guest that is busy for less than this share counts as idle.
const IDLE_SHARE: u64 = 10;

/// Processor time without a new mark after which a guest is stalled. A whole boot takes 1–3 s in
/// software emulation.
const SPIN_AFTER_MS: u64 = 60_000;

/// Reason for which a boot counts as stalled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Stall {
    /// The guest's init reported a failure.
    #[error("the guest's init reported a failure: {0}")]
    Reported(String),
    /// The guest is idle.
    #[error("the guest is idle {0}")]
    Idle(Progress),
    /// The guest uses processor time without progress.
    #[error("the guest is busy without progress {0}")]
    Spinning(Progress),
}

/// Last mark of a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The VMM started.
    Started,
    /// The kernel started its first program.
    KernelUp,
    /// The guest's init started the guest agent.
    InitDone,
}

impl std::fmt::Display for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Started => "before its kernel started",
            Self::KernelUp => "after its kernel started",
            Self::InitDone => "after it started the guest agent",
        })
    }
}

impl From<&MachineStatus> for Progress {
    fn from(status: &MachineStatus) -> Self {
        match (status.kernel_ms, status.init_ms) {
            (_, Some(_)) => Self::InitDone,
            (Some(_), None) => Self::KernelUp,
            (None, None) => Self::Started,
        }
    }
}

/// Watch of one boot.
#[derive(Debug)]
pub(crate) struct BootWatch {
    progress: Progress,
    /// Processor time when `progress` was first seen.
    at_mark: Option<VmmTime>,
    /// Start of the interval in which the guest has been idle so far.
    idle: Option<(Instant, VmmTime)>,
}

impl BootWatch {
    pub(crate) const fn new() -> Self {
        Self {
            progress: Progress::Started,
            at_mark: None,
            idle: None,
        }
    }

    /// Evaluates the status that the supervisor reported at `now`. Returns the reason if the boot
    /// is stalled.
    pub(crate) fn observe(&mut self, now: Instant, status: &MachineStatus) -> Option<Stall> {
        if let Some(reason) = &status.boot_failure {
            return Some(Stall::Reported(reason.clone()));
        }
        let progress = Progress::from(status);
        let time = status.vmm_time?;
        if progress != self.progress || self.at_mark.is_none() {
            self.progress = progress;
            self.at_mark = Some(time);
            self.idle = None;
        }
        if status.waits_for_disk {
            self.idle = None;
        }
        let at_mark = self.at_mark.unwrap_or(time);
        if time.running_ms.saturating_sub(at_mark.running_ms) > SPIN_AFTER_MS {
            return Some(Stall::Spinning(progress));
        }
        let (since, then) = *self.idle.get_or_insert((now, time));
        if is_busy(then, time) {
            self.idle = Some((now, time));
            return None;
        }
        (now.duration_since(since) >= IDLE_AFTER).then_some(Stall::Idle(progress))
    }

    /// Restarts the idle interval, because the supervisor did not answer and the guest may have
    /// been busy.
    pub(crate) fn reset(&mut self) {
        self.idle = None;
    }
}

/// True if a VMM was busy between two readings for longer than an idle VMM is in [`IDLE_AFTER`].
fn is_busy(from: VmmTime, to: VmmTime) -> bool {
    let limit_ms = u64::try_from(IDLE_AFTER.as_millis()).unwrap_or(u64::MAX) / IDLE_SHARE;
    let running_ms = to.running_ms.saturating_sub(from.running_ms);
    let waiting_ms = to.waiting_ms.saturating_sub(from.waiting_ms);
    running_ms.saturating_add(waiting_ms) > limit_ms
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn status(running_ms: u64, waiting_ms: u64) -> MachineStatus {
        MachineStatus {
            kernel_ms: Some(1),
            vmm_time: Some(VmmTime {
                running_ms,
                waiting_ms,
            }),
            ..MachineStatus::default()
        }
    }

    /// Feeds one status every half second; returns the first verdict and the seconds until it.
    fn run(statuses: impl IntoIterator<Item = MachineStatus>) -> Option<(Stall, u64)> {
        let (start, mut watch) = (Instant::now(), BootWatch::new());
        for (tick, status) in (0_u32..).zip(statuses) {
            let now = start + Duration::from_millis(500) * tick;
            if let Some(stall) = watch.observe(now, &status) {
                return Some((stall, now.duration_since(start).as_secs()));
            }
        }
        None
    }

    #[test]
    fn an_idle_guest_is_stalled_within_seconds() {
        let (stall, seconds) = run((0..100).map(|n| status(900 + n, 50))).expect("stalled");
        assert_eq!(stall, Stall::Idle(Progress::KernelUp));
        assert!((6..=7).contains(&seconds), "{seconds}");
    }

    #[test]
    fn guest_that_waits_for_a_processor_is_not_stalled() {
        assert_eq!(run((0..100).map(|n| status(900, n * 400))), None);
        assert_eq!(run((0..100).map(|n| status(n * 100, n * 20))), None);
    }

    #[test]
    fn a_guest_that_becomes_idle_is_stalled_from_then_on() {
        let busy = (0..20).map(|n| status(n * 500, 0));
        let idle = (0..20).map(|_| status(9500, 0));
        let (stall, seconds) = run(busy.chain(idle)).expect("stalled");
        assert_eq!(stall, Stall::Idle(Progress::KernelUp));
        assert!((15..=16).contains(&seconds), "{seconds}");
    }

    #[test]
    fn boot_mark_restarts_the_watch() {
        let before = (0..10).map(|_| status(900, 0));
        let after = (0..10).map(|_| MachineStatus {
            init_ms: Some(2),
            ..status(900, 0)
        });
        assert_eq!(run(before.chain(after)), None);
    }

    #[test]
    fn a_guest_that_spins_is_stalled_after_a_minute_of_processor_time() {
        let (stall, seconds) = run((0..1000).map(|n| status(n * 500, 0))).expect("stalled");
        assert_eq!(stall, Stall::Spinning(Progress::KernelUp));
        assert!((60..=61).contains(&seconds), "{seconds}");
    }

    #[test]
    fn failure_reported_by_init_stalls_at_once() {
        let reported = MachineStatus {
            boot_failure: Some("no timer".to_owned()),
            ..MachineStatus::default()
        };
        assert_eq!(
            run([reported]),
            Some((Stall::Reported("no timer".to_owned()), 0))
        );
    }

    #[test]
    fn a_full_disk_and_an_old_supervisor_are_no_stall() {
        let full = (0..100).map(|_| MachineStatus {
            waits_for_disk: true,
            ..status(900, 0)
        });
        assert_eq!(run(full), None);
        assert_eq!(run((0..100).map(|_| MachineStatus::default())), None);
    }

    proptest! {
        #[test]
        fn a_guest_that_is_busy_a_fifth_of_the_time_is_never_stalled(
            steps in prop::collection::vec((100_u64..300, 0_u64..200), 1..100)
        ) {
            let mut at = (0, 0);
            let statuses = steps.into_iter().map(|(running, waiting)| {
                at = (at.0 + running, at.1 + waiting);
                status(at.0, at.1)
            });
            let stalled = run(statuses);
            prop_assert!(stalled.is_none(), "{stalled:?}");
        }
    }
}
