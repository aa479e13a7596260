//! What becomes of a sandbox that nobody uses: paused or destroyed, as it was created to be. A pause that fails is tried
//! again, each time later.
//!
//! What the reconciler saw is old when the lock is there, and a use changes no row. So all is looked at anew: what is known here,
//! then what the host knows. Then the row is marked, `pausing` either way, and it is looked once more who uses it: a user marks
//! the use and then reads the row, the reaper marks the row and then reads the uses, so one of them sees the other. If somebody
//! came, the mark is taken away, and nothing has happened. A mark that a process leaves as it dies is the reconciler's.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use wrenn_proto::{
    SandboxId,
    rest::{OnTimeout, SandboxStatus},
    rpc::hostagent::v1::SandboxState,
};

use super::{Lifecycle, LifecycleError, told};
use crate::{clock, db::sandboxes::Sandbox};

/// Until the second attempt; each further one waits twice as long.
const FIRST_WAIT_SEC: u32 = 2;

/// Between two attempts at most.
const MAX_WAIT_SEC: u32 = 300;

/// Attempts that failed.
#[derive(Debug, Clone, Copy)]
struct Failed {
    wait_sec: u32,
    not_before_ms: i64,
}

/// The sandboxes that could not be paused.
#[derive(Debug, Default)]
pub(super) struct Reaping {
    table: Mutex<HashMap<SandboxId, Failed>>,
}

impl Reaping {
    /// Milliseconds since 1970 before which it is not tried again; 0: it did not fail.
    pub(super) fn not_before_ms(&self, id: &SandboxId) -> i64 {
        self.table()
            .get(id)
            .map_or(0, |failed| failed.not_before_ms)
    }

    pub(super) fn forget(&self, id: &SandboxId) {
        self.table().remove(id);
    }

    /// Notes a failure; seconds until the next attempt.
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
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lifecycle {
    /// Ends the idleness of a sandbox, for one who holds its lock and found that it was idle for so long. Does nothing if somebody
    /// has used it since.
    pub(crate) async fn reap_locked(
        &self,
        id: &SandboxId,
        idle_sec: u64,
        on_timeout: OnTimeout,
    ) -> Result<(), LifecycleError> {
        if !self.is_idle_still(id).await? || !self.mark_unused(id).await? {
            tracing::info!(sandbox_id = %id, "it is not idle any more");
            return Ok(());
        }
        let why = format!("it was idle for {idle_sec} s");
        if on_timeout == OnTimeout::Kill {
            return self.destroy_locked(id, &why).await;
        }
        let Err(error) = self.pause_begun(id).await else {
            return Ok(());
        };
        self.pause_failed(id, &error, &why).await;
        Err(error)
    }

    /// Whether it is idle by all that is known here, and by what the host says now.
    async fn is_idle_still(&self, id: &SandboxId) -> Result<bool, LifecycleError> {
        let row = self.get(id).await?;
        if row.status != SandboxStatus::Running || !self.is_idle_here(&row) {
            return Ok(false);
        }
        let running = SandboxState::SANDBOX_STATE_RUNNING;
        // What else the host may say of it is for the next look.
        let found = self.agent.find(id.as_str()).await?;
        let found = found.filter(|info| info.state.as_known() == Some(running));
        Ok(found.is_some_and(|info| {
            !is_within(row.timeout_sec, info.last_active_unix_ms, clock::now_ms())
        }))
    }

    /// Marks it, unless somebody has come. False then: it runs on.
    async fn mark_unused(&self, id: &SandboxId) -> Result<bool, LifecycleError> {
        let row = self.begin_pause(id, false).await?;
        if self.is_idle_here(&row) {
            return Ok(true);
        }
        self.unmark_pause(id).await?;
        Ok(false)
    }

    /// Whether nobody uses it, nor has within the time that it may be idle, as far as this process knows.
    fn is_idle_here(&self, row: &Sandbox) -> bool {
        let (in_use, last_ended_ms) = self.uses.of(&row.id);
        let last_ms = last_ended_ms.max(row.last_active_at).max(row.started_at);
        !in_use && !is_within(row.timeout_sec, last_ms, clock::now_ms())
    }

    /// Notes that a sandbox which was to be paused (`why`) could not be, for whoever tries again and for whoever looks at it.
    pub(super) async fn pause_failed(&self, id: &SandboxId, error: &LifecycleError, why: &str) {
        let wait_sec = self.reaping.failed(id, clock::now_ms());
        let LifecycleError::Agent(error) = error else {
            return;
        };
        let warning = format!(
            "{why} but it could not be paused: {}; it runs on, and will be tried again after {wait_sec} s",
            told(error)
        );
        self.note(id, |row| {
            if row.status == SandboxStatus::Running {
                row.warning.clone_from(&warning);
            }
        })
        .await;
    }

    /// Milliseconds since 1970 before which an idle sandbox is left alone; 0: it is not.
    pub(crate) fn not_reaped_before_ms(&self, id: &SandboxId) -> i64 {
        self.reaping.not_before_ms(id)
    }
}

/// Whether a sandbox that was last used then may be idle still. One without a time may be for ever.
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
        let reaping = Reaping::default();
        let id: SandboxId = "sb-1".parse().unwrap();
        assert_eq!(reaping.not_before_ms(&id), 0);
        let waits: Vec<u32> = (0..10).map(|_| reaping.failed(&id, 1000)).collect();
        assert_eq!(waits, [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(reaping.not_before_ms(&id), 301_000);
        reaping.forget(&id);
        assert_eq!(reaping.failed(&id, 0), 2);
    }

    #[test]
    fn an_idle_time_is_over_at_its_end_and_not_before() {
        for (timeout_sec, last_used_ms, now_ms, within) in [
            (2, 1000, 2999, true),
            (2, 1000, 3000, false),
            (2, 0, i64::MAX, false),
            // Another machine's clock may be before this one's.
            (2, 5000, 1000, true),
            (0, 0, i64::MAX, true),
        ] {
            let got = is_within(timeout_sec, last_used_ms, now_ms);
            assert_eq!(got, within, "{timeout_sec} {last_used_ms} {now_ms}");
        }
    }
}
