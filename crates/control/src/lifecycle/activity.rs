//! Activity of sandboxes: the only place that counts commands, file transfers, sessions and
//! traffic. All of these reach the guest through tunnels, which the agent does not count.

use std::{collections::HashMap, sync::Arc};

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;
use wrenn_model::SandboxId;

use super::Lifecycle;
use crate::clock;

/// Activity of a sandbox through this process.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Use {
    open: usize,
    /// End of the last use, in milliseconds since 1970; 0 if there was none.
    pub(super) last_ended_ms: i64,
    /// The same by the monotonic clock.
    pub(super) last_ended: Option<Instant>,
}

impl Use {
    /// True if the sandbox is in use now.
    pub(super) const fn is_open(&self) -> bool {
        self.open > 0
    }
}

/// Activity of all sandboxes.
#[derive(Debug, Default)]
pub(super) struct ActivityTracker {
    table: Mutex<HashMap<SandboxId, Use>>,
}

impl ActivityTracker {
    pub(super) fn of(&self, id: &SandboxId) -> Use {
        self.table().get(id).copied().unwrap_or_default()
    }

    /// Removes a sandbox that is gone.
    pub(super) fn forget(&self, id: &SandboxId) {
        let mut table = self.table();
        if table.get(id).is_some_and(|u| u.open == 0) {
            table.remove(id);
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<SandboxId, Use>> {
        self.table.lock()
    }
}

/// Activity in progress. Ends when dropped.
pub struct ActivityGuard {
    lifecycle: Arc<Lifecycle>,
    id: SandboxId,
    /// True if the end of this activity counts as the last use of the sandbox.
    counts: bool,
}

impl ActivityGuard {
    /// Marks a sandbox as in use until the guard is dropped.
    pub fn new(lifecycle: Arc<Lifecycle>, id: SandboxId) -> Self {
        lifecycle
            .activity
            .table()
            .entry(id.clone())
            .or_default()
            .open += 1;
        Self {
            lifecycle,
            id,
            counts: true,
        }
    }

    /// Withdraws an activity that did not reach the sandbox. The time of the last use stays
    /// unchanged.
    pub(super) fn withdraw(mut self) {
        self.counts = false;
    }
}

impl Drop for ActivityGuard {
    fn drop(&mut self) {
        let mut table = self.lifecycle.activity.table();
        if let Some(found) = table.get_mut(&self.id) {
            found.open = found.open.saturating_sub(1);
            if self.counts {
                found.last_ended_ms = clock::now_ms();
                found.last_ended = Some(Instant::now());
            } else if found.open == 0 && found.last_ended_ms == 0 {
                // The id may belong to no sandbox.
                table.remove(&self.id);
            }
        }
    }
}
