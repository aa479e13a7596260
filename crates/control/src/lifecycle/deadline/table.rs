//! Deadlines of running sandboxes by the monotonic clock. No I/O.
//!
//! A deadline is converted when it is first seen. From then on, a step of the wall clock does not
//! change it. A row with a higher version replaces what is known, and a list of rows never replaces
//! what became known after it was read.

use std::{collections::HashMap, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;
use wrenn_db::{DeadlineRow, Sandbox};
use wrenn_model::{SandboxId, SandboxStatus};

use crate::clock;

/// Limit of a deadline in the future: 30 years. An instant cannot be arbitrarily late.
const MAX_LEFT: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

#[derive(Debug, Clone, Copy)]
struct Deadline {
    /// Time of the wall clock in the row, in milliseconds since 1970.
    expires_at: i64,
    due: Instant,
    version: i64,
    noted_at: Instant,
}

/// Deadlines of running sandboxes.
#[derive(Debug, Default)]
pub(in crate::lifecycle) struct Deadlines {
    table: Mutex<HashMap<SandboxId, Deadline>>,
}

impl Deadlines {
    /// Takes over the deadline of a row, or its absence.
    pub(in crate::lifecycle) fn note(&self, row: &Sandbox) {
        let runs = row.status == SandboxStatus::Running && row.expires_at > 0;
        let mut table = self.table();
        if runs {
            note(
                &mut table,
                &row.id,
                row.version,
                row.expires_at,
                clock::now_ms(),
            );
        } else if table
            .get(&row.id)
            .is_some_and(|known| known.version <= row.version)
        {
            table.remove(&row.id);
        }
    }

    /// Takes over the deadlines of all running sandboxes, which were read at this time.
    pub(super) fn sync(&self, rows: &[DeadlineRow], read_at: Instant) {
        let now_ms = clock::now_ms();
        let mut table = self.table();
        for row in rows {
            note(&mut table, &row.id, row.version, row.expires_at, now_ms);
        }
        let listed: std::collections::HashSet<_> = rows.iter().map(|row| &row.id).collect();
        table.retain(|id, known| known.noted_at >= read_at || listed.contains(id));
    }

    pub(super) fn forget(&self, id: &SandboxId) {
        self.table().remove(id);
    }

    /// Returns the deadline of a sandbox by the wall clock, in milliseconds since 1970; 0 if it has
    /// none.
    pub(super) fn expires_at(&self, id: &SandboxId) -> i64 {
        self.table().get(id).map_or(0, |known| known.expires_at)
    }

    /// True if the deadline of a sandbox has passed.
    pub(super) fn is_due(&self, id: &SandboxId) -> bool {
        let due = self.table().get(id).map(|known| known.due);
        due.is_some_and(|due| due <= Instant::now())
    }

    /// Returns the time until the deadline of a sandbox; `None` if it has none.
    pub(in crate::lifecycle) fn left(&self, id: &SandboxId) -> Option<Duration> {
        let due = self.table().get(id)?.due;
        Some(due.saturating_duration_since(Instant::now()))
    }

    /// Returns all deadlines, the earliest first.
    pub(super) fn all(&self) -> Vec<(Instant, SandboxId)> {
        let table = self.table();
        let mut all: Vec<_> = table
            .iter()
            .map(|(id, known)| (known.due, id.clone()))
            .collect();
        all.sort_unstable();
        all
    }

    fn table(&self) -> MutexGuard<'_, HashMap<SandboxId, Deadline>> {
        self.table.lock()
    }
}

fn note(
    table: &mut HashMap<SandboxId, Deadline>,
    id: &SandboxId,
    version: i64,
    expires_at: i64,
    now_ms: i64,
) {
    let now = Instant::now();
    match table.get_mut(id) {
        Some(known) if known.version > version => {}
        // The same deadline, in a row that changed for another reason.
        Some(known) if known.expires_at == expires_at => known.version = version,
        _ => {
            let left = clock::between_ms(now_ms, expires_at).min(MAX_LEFT);
            let deadline = Deadline {
                expires_at,
                due: now + left,
                version,
                noted_at: now,
            };
            table.insert(id.clone(), deadline);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::*;

    fn row(version: i64, expires_in_ms: i64) -> DeadlineRow {
        DeadlineRow {
            id: "sb-1".parse().unwrap(),
            host_id: "host".to_owned(),
            version,
            expires_at: clock::now_ms() + expires_in_ms,
        }
    }

    /// Returns the seconds until the deadline, rounded up.
    fn left_sec(deadlines: &Deadlines) -> Option<u128> {
        let left = deadlines.left(&"sb-1".parse().unwrap())?;
        Some(left.as_millis().div_ceil(1000))
    }

    #[tokio::test]
    async fn wall_clock_step_moves_no_known_deadline() {
        let deadlines = Deadlines::default();
        let known = row(1, 60_000);
        deadlines.sync(std::slice::from_ref(&known), Instant::now());
        for step_ms in [7_200_000, -14_400_000] {
            clock::step(step_ms);
            deadlines.sync(std::slice::from_ref(&known), Instant::now());
            assert_eq!(left_sec(&deadlines), Some(60));
        }
        // A deadline that was set after the step is a time of the new clock.
        deadlines.sync(&[row(2, 90_000)], Instant::now());
        assert_eq!(left_sec(&deadlines), Some(90));
    }

    #[tokio::test]
    async fn older_list_replaces_no_newer_deadline() {
        let deadlines = Deadlines::default();
        let read_at = Instant::now();
        deadlines.sync(&[row(2, 10_000)], Instant::now());
        deadlines.sync(&[row(1, 90_000)], read_at);
        assert_eq!(left_sec(&deadlines), Some(10));
        // Noted after the list was read.
        deadlines.sync(&[], read_at);
        assert_eq!(left_sec(&deadlines), Some(10));
        deadlines.sync(&[], Instant::now() + Duration::from_millis(1));
        assert_eq!(left_sec(&deadlines), None);
    }
}
