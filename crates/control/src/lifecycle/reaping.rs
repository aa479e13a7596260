//! What becomes of a sandbox that nobody uses: paused or destroyed, as it was created to be. A pause that fails is tried
//! again, each time later.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use wrenn_proto::{
    SandboxId,
    rest::{OnTimeout, SandboxStatus},
};

use super::{Lifecycle, LifecycleError, told};
use crate::clock;

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
    /// Ends the idleness of a sandbox, for one who holds its lock.
    pub(crate) async fn reap_locked(
        &self,
        id: &SandboxId,
        idle_sec: u64,
        on_timeout: OnTimeout,
    ) -> Result<(), LifecycleError> {
        // Somebody may have come since the look.
        if self.uses.of(id).0 {
            return Ok(());
        }
        if on_timeout == OnTimeout::Kill {
            let why = format!("it was idle for {idle_sec} s");
            return self.destroy_locked(id, &why).await;
        }
        let Err(error) = self.pause_unused_locked(id).await else {
            return Ok(());
        };
        let why = format!("it was idle for {idle_sec} s");
        self.pause_failed(id, &error, &why).await;
        Err(error)
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
}
