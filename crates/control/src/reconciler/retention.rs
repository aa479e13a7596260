//! Removal of the rows of sandboxes that ended long ago.
//!
//! A run goes through the rows that ended before the retention time, a batch per pass of the
//! reconciler, and ends when there are no more. The next run begins an hour later. A row that
//! changed since it was read stays.

use std::time::Duration;

use tokio::time::Instant;
use wrenn_db::{Db, DbError};
use wrenn_model::SandboxId;

use crate::clock;

/// Number of rows that are removed per pass of the reconciler.
const BATCH: u32 = 500;

/// Interval of runs.
const EVERY: Duration = Duration::from_secs(3600);

/// Removal of rows.
#[derive(Debug)]
pub(super) struct Retention {
    /// Time that a row is kept after its end; `None`: for ever.
    keep: Option<Duration>,
    next_run: Instant,
    /// Last row that the current run has looked at.
    after: Option<(i64, SandboxId)>,
}

impl Retention {
    pub(super) fn new(keep: Option<Duration>) -> Self {
        Self {
            keep,
            next_run: Instant::now(),
            after: None,
        }
    }

    /// Removes a batch of rows of these hosts, if a run is due. Rows for which `exists` is true stay.
    pub(super) async fn look(
        &mut self,
        db: &Db,
        host_ids: [&str; 2],
        exists: impl Fn(&SandboxId) -> bool + Send + Sync,
    ) -> Result<(), DbError> {
        let Some(keep) = self.keep else {
            return Ok(());
        };
        if Instant::now() < self.next_run {
            return Ok(());
        }
        let keep_ms = i64::try_from(keep.as_millis()).unwrap_or(i64::MAX);
        let before_ms = clock::now_ms().saturating_sub(keep_ms);
        let after = self.after.as_ref().map(|(time, id)| (*time, id));
        let rows = db.ended(host_ids, before_ms, after, BATCH).await?;
        let is_last = u32::try_from(rows.len()).is_ok_and(|count| count < BATCH);
        self.after = rows.last().map(|row| (row.last_updated, row.id.clone()));
        if is_last {
            self.after = None;
            self.next_run = Instant::now() + keep.min(EVERY);
        }
        let mut removed = 0;
        for row in rows.iter().filter(|row| !exists(&row.id)) {
            if db.remove_sandbox(&row.id, row.version).await? {
                removed += 1;
            }
        }
        if removed > 0 {
            tracing::info!(removed, "rows of sandboxes that have ended removed");
        }
        Ok(())
    }
}
