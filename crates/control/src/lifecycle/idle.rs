//! Idle sandboxes: pauses or destroys them, as requested at their creation. A failed pause is
//! retried with increasing delays.
//!
//! The reconciler's view may be stale once the lock is held, and activity changes no row. Idleness
//! is therefore re-checked: first local activity, then the agent's. Then the row is marked
//! `pausing` in either case, and local activity is checked once more. A user registers its activity
//! and then reads the row; the reaper marks the row and then reads the activity, so one of them
//! sees the other. If there is new activity, the mark is removed and nothing has happened. A mark
//! that a dying process leaves behind is settled by the reconciler.

use std::collections::HashMap;

use parking_lot::{Mutex, MutexGuard};
use wrenn_db::Sandbox;
use wrenn_model::{OnTimeout, SandboxId, SandboxStatus};

use super::{Lifecycle, LifecycleError, report::HostState, told};
use crate::clock;

/// Delay before the second attempt. Each further delay is twice as long.
const FIRST_WAIT_SEC: u32 = 2;

/// Maximum delay between two attempts.
const MAX_WAIT_SEC: u32 = 300;

/// Failed attempts to pause a sandbox.
#[derive(Debug, Clone, Copy)]
struct Failed {
    wait_sec: u32,
    not_before_ms: i64,
}

/// Sandboxes that could not be paused.
#[derive(Debug, Default)]
pub(super) struct IdleReaper {
    table: Mutex<HashMap<SandboxId, Failed>>,
}

impl IdleReaper {
    /// Returns the earliest time of the next attempt, in milliseconds since the Unix epoch; 0 if no
    /// attempt failed.
    pub(super) fn not_before_ms(&self, id: &SandboxId) -> i64 {
        self.table()
            .get(id)
            .map_or(0, |failed| failed.not_before_ms)
    }

    pub(super) fn forget(&self, id: &SandboxId) {
        self.table().remove(id);
    }

    /// Records a failure. Returns the delay until the next attempt, in seconds.
    pub(super) fn failed(&self, id: &SandboxId, now_ms: i64) -> u32 {
        let mut table = self.table();
        let wait_sec = table.get(id).map_or(FIRST_WAIT_SEC, |failed| {
            failed.wait_sec.saturating_mul(2).min(MAX_WAIT_SEC)
        });
        let not_before_ms = now_ms.saturating_add(i64::from(wait_sec) * 1000);
        let failed = Failed {
            wait_sec,
            not_before_ms,
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
    pub async fn reap_locked(
        &self,
        id: &SandboxId,
        idle_sec: u64,
        on_timeout: OnTimeout,
    ) -> Result<(), LifecycleError> {
        let marked = match self.is_idle_still(id).await? {
            true => self.mark_unused(id).await?,
            false => None,
        };
        let Some(row) = marked else {
            tracing::info!(sandbox_id = %id, "sandbox no longer idle");
            return Ok(());
        };
        let why = format!("idle for {idle_sec} s");
        if on_timeout == OnTimeout::Kill {
            return self.destroy_locked(id, &why).await;
        }
        let Err(error) = self.pause_begun(&row).await else {
            return Ok(());
        };
        self.pause_failed(id, &error, &why).await;
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
            !is_within(row.timeout_sec, report.last_active_ms, clock::now_ms())
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
        let (in_use, last_ended_ms) = self.activity.of(&row.id);
        let last_ms = last_ended_ms.max(row.last_active_at).max(row.started_at);
        !in_use && !is_within(row.timeout_sec, last_ms, clock::now_ms())
    }

    /// Records a failed pause, for the next attempt and in the row's warning. `why` is the reason
    /// of the pause.
    pub(super) async fn pause_failed(&self, id: &SandboxId, error: &LifecycleError, why: &str) {
        let wait_sec = self.idle.failed(id, clock::now_ms());
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

    /// Returns the time before which an idle sandbox is left alone, in milliseconds since the Unix
    /// epoch; 0 if there is none.
    pub fn not_reaped_before_ms(&self, id: &SandboxId) -> i64 {
        self.idle.not_before_ms(id)
    }
}

/// True if a sandbox last used at `last_used_ms` is still within its idle timeout. Without a
/// timeout, it always is.
fn is_within(timeout_sec: u32, last_used_ms: i64, now_ms: i64) -> bool {
    let idle_ms = now_ms.saturating_sub(last_used_ms);
    timeout_sec == 0 || idle_ms < i64::from(timeout_sec) * 1000
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::*;

    #[test]
    fn each_failure_waits_twice_as_long_up_to_a_limit() {
        let idle = IdleReaper::default();
        let id: SandboxId = "sb-1".parse().unwrap();
        assert_eq!(idle.not_before_ms(&id), 0);
        let waits: Vec<u32> = (0..10).map(|_| idle.failed(&id, 1000)).collect();
        assert_eq!(waits, [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(idle.not_before_ms(&id), 301_000);
        idle.forget(&id);
        assert_eq!(idle.failed(&id, 0), 2);
    }

    #[test]
    fn an_idle_time_is_over_at_its_end_and_not_before() {
        for (timeout_sec, last_used_ms, now_ms, within) in [
            (2, 1000, 2999, true),
            (2, 1000, 3000, false),
            (2, 0, i64::MAX, false),
            // Another host's clock may be behind this one's.
            (2, 5000, 1000, true),
            (0, 0, i64::MAX, true),
        ] {
            let got = is_within(timeout_sec, last_used_ms, now_ms);
            assert_eq!(got, within, "{timeout_sec} {last_used_ms} {now_ms}");
        }
    }
}
