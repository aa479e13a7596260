//! Idle times of sandboxes by the monotonic clock. No I/O.
//!
//! Activity has three sources: calls through this process, whose end is recorded here as an instant;
//! the host's report; and the row, in which other processes record activity. The last two are times
//! of the wall clock of some machine. They are therefore not compared with the current time, except
//! when a sandbox is first seen: a value that changes means activity since the last look. A step of a
//! wall clock, and clocks that differ between machines, neither end nor prolong an idle time.

use std::{collections::HashMap, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;
use wrenn_model::SandboxId;

use crate::clock;

/// Last look at a sandbox.
#[derive(Debug, Clone, Copy)]
struct Idle {
    /// Time of the last activity in the row.
    row_ms: i64,
    /// Time of the last activity that the host has reported; `None` before its first report.
    host_ms: Option<i64>,
    /// Idle time when the last activity was seen, and the instant at which it was seen.
    idle_then: Duration,
    seen_at: Instant,
    looked_at: Instant,
}

impl Idle {
    /// Returns the first look, at which the clocks are compared.
    fn at_first(row_ms: i64, host_ms: Option<i64>, now_ms: i64, now: Instant) -> Self {
        let active_ms = row_ms.max(host_ms.unwrap_or(0));
        Self {
            row_ms,
            host_ms,
            idle_then: clock::between_ms(active_ms, now_ms),
            seen_at: now,
            looked_at: now,
        }
    }

    /// Returns the idle time at a further look.
    fn look(&mut self, row_ms: i64, host_ms: Option<i64>, now_ms: i64, now: Instant) -> Duration {
        // The row also takes over what the host has reported, which is not new.
        let is_new_in_row = row_ms > self.row_ms.max(self.host_ms.unwrap_or(0));
        let news = [
            host_ms.filter(|_| host_ms != self.host_ms),
            is_new_in_row.then_some(row_ms),
        ];
        let since_look = now.duration_since(self.looked_at);
        let newest = news.into_iter().flatten();
        let newest = newest.map(|active_ms| clock::between_ms(active_ms, now_ms));
        if let Some(idle_then) = newest.min() {
            self.idle_then = idle_then.min(since_look);
            self.seen_at = now;
        }
        self.row_ms = row_ms;
        self.host_ms = host_ms;
        self.looked_at = now;
        self.idle_then + now.duration_since(self.seen_at)
    }
}

/// Idle times of all sandboxes.
#[derive(Debug, Default)]
pub(super) struct IdleTimes {
    table: Mutex<HashMap<SandboxId, Idle>>,
}

impl IdleTimes {
    /// Returns the idle time of a sandbox, apart from calls through this process. `row_ms` and
    /// `host_ms` are the times of the last activity, in milliseconds since 1970. Without `host_ms`,
    /// the last report of the host counts.
    pub(super) fn of(
        &self,
        id: &SandboxId,
        row_ms: i64,
        host_ms: Option<i64>,
        now_ms: i64,
    ) -> Duration {
        let now = Instant::now();
        let mut table = self.table();
        let idle = table
            .entry(id.clone())
            .or_insert_with(|| Idle::at_first(row_ms, host_ms, now_ms, now));
        if idle.host_ms.is_none() {
            *idle = Idle::at_first(row_ms, host_ms, now_ms, now);
        }
        idle.look(row_ms, host_ms.or(idle.host_ms), now_ms, now)
    }

    /// Forgets all sandboxes that do not exist any more.
    pub(super) fn retain(&self, exists: impl Fn(&SandboxId) -> bool) {
        self.table().retain(|id, _| exists(id));
    }

    fn table(&self) -> MutexGuard<'_, HashMap<SandboxId, Idle>> {
        self.table.lock()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::*;

    const HOUR_MS: i64 = 3_600_000;
    const NOW_MS: i64 = 1_700_000_000_000;

    struct World {
        times: IdleTimes,
        id: SandboxId,
        now_ms: i64,
    }

    impl World {
        fn new() -> Self {
            Self {
                times: IdleTimes::default(),
                id: "sb-1".parse().unwrap(),
                now_ms: NOW_MS,
            }
        }

        /// Lets both clocks advance, and the wall clock by an additional step.
        async fn advance(&mut self, sec: u64, step_ms: i64) {
            tokio::time::advance(Duration::from_secs(sec)).await;
            self.now_ms += i64::try_from(sec).unwrap() * 1000 + step_ms;
        }

        fn idle_sec(&self, row_ms: i64, host_ms: i64) -> u64 {
            let idle = self.times.of(&self.id, row_ms, Some(host_ms), self.now_ms);
            idle.as_secs()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn wall_clock_step_changes_no_idle_time() {
        for step_ms in [0, HOUR_MS, -HOUR_MS, -2 * NOW_MS] {
            let mut world = World::new();
            let active_ms = NOW_MS - 5000;
            assert_eq!(world.idle_sec(active_ms, active_ms), 5);
            world.advance(10, step_ms).await;
            assert_eq!(world.idle_sec(active_ms, active_ms), 15, "{step_ms}");
            world.advance(10, -step_ms).await;
            assert_eq!(world.idle_sec(active_ms, active_ms), 25, "{step_ms}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn activity_is_seen_after_a_wall_clock_step() {
        for step_ms in [0, HOUR_MS, -HOUR_MS] {
            let mut world = World::new();
            world.idle_sec(NOW_MS, NOW_MS);
            world.advance(100, step_ms).await;
            // The host reports a time of the new clock, one second ago.
            let reported = world.now_ms - 1000;
            assert_eq!(world.idle_sec(NOW_MS, reported), 1, "{step_ms}");
            world.advance(5, 0).await;
            // The row takes it over, which is not another activity.
            assert_eq!(world.idle_sec(reported, reported), 6, "{step_ms}");
            world.advance(5, 0).await;
            // Another process has recorded activity in the row.
            let recorded = reported + 8000;
            assert_eq!(world.idle_sec(recorded, reported), 3, "{step_ms}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn clock_of_another_machine_may_differ() {
        let mut world = World::new();
        let theirs = NOW_MS - HOUR_MS;
        world.idle_sec(NOW_MS, theirs);
        world.advance(30, 0).await;
        // Activity since the last look is no older than the last look.
        assert_eq!(world.idle_sec(NOW_MS, theirs + 20_000), 30);
        world.advance(2, 0).await;
        assert_eq!(world.idle_sec(NOW_MS, theirs + 31_000), 2);
        let ahead = NOW_MS + HOUR_MS;
        assert_eq!(world.idle_sec(NOW_MS, ahead), 0);
        world.advance(7, 0).await;
        assert_eq!(world.idle_sec(NOW_MS, ahead), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn first_report_of_the_host_is_no_activity() {
        let mut world = World::new();
        let row_ms = NOW_MS - 60_000;
        let idle = |world: &World, host_ms| {
            let idle = world.times.of(&world.id, row_ms, host_ms, world.now_ms);
            idle.as_secs()
        };
        assert_eq!(idle(&world, None), 60);
        world.advance(5, 0).await;
        assert_eq!(idle(&world, None), 65);
        assert_eq!(idle(&world, Some(row_ms - 1000)), 65);
        world.advance(5, 0).await;
        assert_eq!(idle(&world, Some(row_ms - 1000)), 70);
    }

    #[tokio::test(start_paused = true)]
    async fn last_report_counts_without_a_new_one() {
        let mut world = World::new();
        world.idle_sec(NOW_MS - 9000, NOW_MS - 4000);
        world.advance(3, 0).await;
        let idle = world.times.of(&world.id, NOW_MS - 9000, None, world.now_ms);
        assert_eq!(idle.as_secs(), 7);
    }
}
