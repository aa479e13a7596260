//! Idle sandboxes: pauses or destroys them, as requested at their creation. A failed pause is
//! retried with increasing delays, and with more effort.
//!
//! The reconciler's view may be stale once the lock is held, and activity changes no row. Idleness
//! is therefore re-checked: first local activity, then the agent's. Then the row is marked
//! `pausing` in either case, and local activity is checked once more. A user registers its activity
//! and then reads the row; the reaper marks the row and then reads the activity, so one of them
//! sees the other. If there is new activity, the mark is removed and nothing has happened. A mark
//! that a dying process leaves behind is settled by the reconciler.
//!
//! The lifetime of a sandbox is a promise to the operator, so neither its guest nor a failure that
//! lasts may prolong it
//! ([0023](../../../../docs/decisions/0023-end-a-lifetime-without-the-guest.md)). The attempts of
//! one idle period, or of one deadline:
//!
//! | attempt                                  | effort of the pause                       |
//! |------------------------------------------|-------------------------------------------|
//! | 1, 2                                     | with the guest's preparation              |
//! | 3 to 7                                   | without it                                |
//! | 8 and later                              | without it; if it fails, the VM is ended, |
//! |                                          | and the sandbox is paused at its last     |
//! |                                          | snapshot, or in status `error`            |
//!
//! A failure for lack of disk space on the host, or because the agent does not answer, is not
//! counted: no data is given up for a fault that an operator can repair. A destroy that a client
//! requests ends an attempt at once ([`super::locks`]).

use std::{collections::HashMap, time::Duration};

use connectrpc::ErrorCode;
use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;
use wrenn_db::Sandbox;
use wrenn_model::{OnTimeout, SandboxId, SandboxStatus};
use wrenn_proto::rpc::hostagent::v1::PauseEffort;

use super::{Lifecycle, LifecycleError, report::HostState, told};
use crate::{agent_client::AgentError, clock};

/// Delay before the second attempt. Each further delay is twice as long.
const FIRST_WAIT_SEC: u32 = 2;

/// Maximum delay between two attempts.
const MAX_WAIT_SEC: u32 = 300;

/// Number of failed attempts after which a pause does without the guest's preparation. One failure
/// may be a guest under load; the next attempt follows two seconds later.
const ATTEMPTS_WITH_GUEST: u32 = 2;

/// Number of failed attempts after which the VM is ended if a pause fails. With the delays between
/// them, some two minutes: longer than a host is overloaded, and short beside a lifetime.
const ATTEMPTS_WITHOUT_END: u32 = 7;

/// Failed attempts to pause a sandbox.
#[derive(Debug, Clone, Copy)]
struct Failed {
    /// Idle period or deadline that the attempts belong to: the time of its begin.
    period_ms: i64,
    /// Number of failures that count.
    count: u32,
    wait_sec: u32,
    not_before: Instant,
}

/// Sandboxes that could not be paused.
#[derive(Debug, Default)]
pub(super) struct IdleReaper {
    table: Mutex<HashMap<SandboxId, Failed>>,
}

impl IdleReaper {
    /// Returns the earliest time of the next attempt; `None` if no attempt failed.
    pub(super) fn not_before(&self, id: &SandboxId) -> Option<Instant> {
        self.table().get(id).map(|failed| failed.not_before)
    }

    pub(super) fn forget(&self, id: &SandboxId) {
        self.table().remove(id);
    }

    /// Returns the effort of the next attempt to pause a sandbox whose idle period or deadline has
    /// this time.
    pub(super) fn effort(&self, id: &SandboxId, period_ms: i64) -> PauseEffort {
        let known = self.table().get(id).copied();
        let known = known.filter(|failed| failed.period_ms == period_ms);
        match known.map_or(0, |failed| failed.count) {
            ..ATTEMPTS_WITH_GUEST => PauseEffort::PAUSE_EFFORT_UNSPECIFIED,
            ATTEMPTS_WITH_GUEST..ATTEMPTS_WITHOUT_END => PauseEffort::PAUSE_EFFORT_WITHOUT_GUEST,
            _ => PauseEffort::PAUSE_EFFORT_OR_END,
        }
    }

    /// Records a failure, which counts or not. Returns the delay until the next attempt, in
    /// seconds.
    fn failed(&self, id: &SandboxId, period_ms: i64, counts: bool, now: Instant) -> u32 {
        let mut table = self.table();
        let known = table.get(id).filter(|failed| failed.period_ms == period_ms);
        let wait_sec = known.map_or(FIRST_WAIT_SEC, |failed| {
            failed.wait_sec.saturating_mul(2).min(MAX_WAIT_SEC)
        });
        let failed = Failed {
            period_ms,
            count: known
                .map_or(0, |failed| failed.count)
                .saturating_add(counts.into()),
            wait_sec,
            not_before: now + Duration::from_secs(wait_sec.into()),
        };
        table.insert(id.clone(), failed);
        wait_sec
    }

    fn table(&self) -> MutexGuard<'_, HashMap<SandboxId, Failed>> {
        self.table.lock()
    }
}

impl Lifecycle {
    /// Pauses or destroys a sandbox that was found idle for `idle_sec`. The caller holds its lock.
    /// Does nothing if the sandbox was used since.
    pub async fn reap_locked(&self, id: &SandboxId, idle_sec: u64) -> Result<(), LifecycleError> {
        let marked = match self.is_idle_still(id).await? {
            true => self.mark_unused(id).await?,
            false => None,
        };
        let Some(row) = marked else {
            tracing::info!(sandbox_id = %id, "sandbox no longer idle");
            return Ok(());
        };
        let why = format!("idle for {idle_sec} s");
        if row.on_timeout == OnTimeout::Kill {
            return self.destroy_locked(id, &why).await;
        }
        let period_ms = row.last_active_at.max(row.started_at);
        let effort = self.idle.effort(id, period_ms);
        let Err(error) = self.pause_begun(&row, effort).await else {
            return Ok(());
        };
        self.pause_failed(id, period_ms, &error, &why).await;
        Err(error)
    }

    /// True if the sandbox is idle according to this process and to the host's current report.
    async fn is_idle_still(&self, id: &SandboxId) -> Result<bool, LifecycleError> {
        let row = self.get(id).await?;
        if row.status != SandboxStatus::Running || !self.is_idle_here(&row) {
            return Ok(false);
        }
        // Any other state reported by the host is handled by the reconciler.
        let report = self.report(&row).await?;
        let running = report.filter(|report| report.state == HostState::Running);
        Ok(running.is_some_and(|report| {
            let idle = self.idle_time(&row, Some(report.last_active_ms));
            !is_within(row.timeout_sec, idle)
        }))
    }

    /// Marks the row and returns it, unless there is new activity. In that case, the sandbox keeps
    /// running.
    async fn mark_unused(&self, id: &SandboxId) -> Result<Option<Sandbox>, LifecycleError> {
        let row = self.begin_pause(id, false).await?;
        if self.is_idle_here(&row) {
            return Ok(Some(row));
        }
        self.unmark_pause(id).await?;
        Ok(None)
    }

    /// True if the sandbox is not in use and was not used within its idle timeout, as far as this
    /// process knows.
    fn is_idle_here(&self, row: &Sandbox) -> bool {
        let in_use = self.activity.of(&row.id).is_open();
        !in_use && !is_within(row.timeout_sec, self.idle_time(row, None))
    }

    /// Returns the idle time of a sandbox. See [`idle_time_of`](Self::idle_time_of).
    fn idle_time(&self, row: &Sandbox, host_ms: Option<i64>) -> Duration {
        self.idle_time_of(&row.id, row.last_active_at.max(row.started_at), host_ms)
    }

    /// Returns how long a sandbox has not been used. `row_ms` is the last activity in its row,
    /// `host_ms` the last one that its host has reported; without it, an earlier report counts.
    pub(crate) fn idle_time_of(
        &self,
        id: &SandboxId,
        row_ms: i64,
        host_ms: Option<i64>,
    ) -> Duration {
        let idle = self.idle_times.of(id, row_ms, host_ms, clock::now_ms());
        let last_ended = self.activity.of(id).last_ended;
        last_ended.map_or(idle, |ended| ended.elapsed().min(idle))
    }

    /// Forgets the idle times of all sandboxes that are not active any more.
    pub(crate) fn retain_idle_times(&self, exists: impl Fn(&SandboxId) -> bool) {
        self.idle_times.retain(exists);
    }

    /// Records a failed pause, for the next attempt and in the row's warning. `period_ms` is the
    /// time of the idle period or deadline, and `why` the reason of the pause.
    pub(super) async fn pause_failed(
        &self,
        id: &SandboxId,
        period_ms: i64,
        error: &LifecycleError,
        why: &str,
    ) {
        // The last attempt may have ended the VM. Its failure must not delay the next lifetime.
        let still = [SandboxStatus::Running, SandboxStatus::Pausing];
        if matches!(self.get(id).await, Ok(row) if !still.contains(&row.status)) {
            return;
        }
        let counts = matches!(error, LifecycleError::Agent(error) if counts(error));
        let wait_sec = self.idle.failed(id, period_ms, counts, Instant::now());
        let LifecycleError::Agent(error) = error else {
            return;
        };
        let warning = format!(
            "{why}, but the pause failed: {}; the sandbox keeps running, next attempt in {wait_sec} s",
            told(error)
        );
        self.note(id, |row| {
            if row.status == SandboxStatus::Running {
                row.warning.clone_from(&warning);
            }
        })
        .await;
    }

    /// True if an idle sandbox is left alone for now, because an attempt to pause it failed.
    pub(crate) fn is_reap_delayed(&self, id: &SandboxId) -> bool {
        let not_before = self.idle.not_before(id);
        not_before.is_some_and(|not_before| Instant::now() < not_before)
    }
}

/// True if a failed pause counts as an attempt: the agent has answered, and the reason is not a
/// full disk of the host.
fn counts(error: &AgentError) -> bool {
    !error.connection_lost && error.code != ErrorCode::ResourceExhausted
}

/// True if a sandbox is still within its idle timeout. Without a timeout, it always is.
pub(crate) fn is_within(timeout_sec: u32, idle: Duration) -> bool {
    timeout_sec == 0 || idle < Duration::from_secs(timeout_sec.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::*;

    #[test]
    fn each_failure_waits_twice_as_long_up_to_a_limit() {
        let idle = IdleReaper::default();
        let id: SandboxId = "sb-1".parse().unwrap();
        assert_eq!(idle.not_before(&id), None);
        let now = Instant::now();
        let waits: Vec<u32> = (0..10).map(|_| idle.failed(&id, 0, true, now)).collect();
        assert_eq!(waits, [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        let wanted = now + Duration::from_secs(300);
        assert_eq!(idle.not_before(&id), Some(wanted));
        idle.forget(&id);
        assert_eq!(idle.failed(&id, 0, true, now), 2);
    }

    #[test]
    fn later_attempts_make_more_effort_and_a_new_period_starts_over() {
        use PauseEffort as E;
        let idle = IdleReaper::default();
        let id: SandboxId = "sb-1".parse().unwrap();
        let fail = |period_ms, counts| {
            let effort = idle.effort(&id, period_ms);
            idle.failed(&id, period_ms, counts, Instant::now());
            effort
        };
        let efforts: Vec<_> = (0..10).map(|_| fail(1, true)).collect();
        let [polite, alone, end] = [
            E::PAUSE_EFFORT_UNSPECIFIED,
            E::PAUSE_EFFORT_WITHOUT_GUEST,
            E::PAUSE_EFFORT_OR_END,
        ];
        let expected = [
            polite, polite, alone, alone, alone, alone, alone, end, end, end,
        ];
        assert_eq!(efforts, expected);
        // A failure that does not count increases the delay only.
        assert_eq!([fail(2, false), fail(2, true), fail(2, true)], [polite; 3]);
        assert_eq!(idle.effort(&id, 2), alone);
    }

    #[test]
    fn full_disk_and_unreachable_agent_do_not_count() {
        let error = |code, connection_lost| AgentError {
            code,
            message: String::new(),
            connection_lost,
            exit_code: None,
        };
        assert!(counts(&error(ErrorCode::DeadlineExceeded, false)));
        assert!(counts(&error(ErrorCode::Internal, false)));
        assert!(!counts(&error(ErrorCode::ResourceExhausted, false)));
        assert!(!counts(&error(ErrorCode::Unavailable, true)));
    }

    #[test]
    fn an_idle_time_is_over_at_its_end_and_not_before() {
        for (timeout_sec, idle_ms, within) in [
            (2, 1999, true),
            (2, 2000, false),
            (2, u64::MAX, false),
            (2, 0, true),
            (0, u64::MAX, true),
        ] {
            let got = is_within(timeout_sec, Duration::from_millis(idle_ms));
            assert_eq!(got, within, "{timeout_sec} {idle_ms}");
        }
    }
}
