//! Who uses a sandbox now: the agent knows when a command was started, only this knows that its client still listens.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use wrenn_proto::SandboxId;

use super::Lifecycle;
use crate::clock;

#[derive(Debug, Default, Clone, Copy)]
struct Use {
    open: usize,
    last_ended_ms: i64,
}

/// Uses of all sandboxes.
#[derive(Debug, Default)]
pub(super) struct Uses {
    table: Mutex<HashMap<SandboxId, Use>>,
}

impl Uses {
    pub(super) fn of(&self, id: &SandboxId) -> (bool, i64) {
        let found = self.table().get(id).copied().unwrap_or_default();
        (found.open > 0, found.last_ended_ms)
    }

    /// Forgets a sandbox that is gone.
    pub(super) fn forget(&self, id: &SandboxId) {
        let mut table = self.table();
        if table.get(id).is_some_and(|u| u.open == 0) {
            table.remove(id);
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<SandboxId, Use>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A use; over when dropped.
pub(crate) struct UseGuard {
    lifecycle: Arc<Lifecycle>,
    id: SandboxId,
    /// Whether its end is when the sandbox was last used.
    counts: bool,
}

impl UseGuard {
    pub(crate) fn new(lifecycle: Arc<Lifecycle>, id: SandboxId) -> Self {
        lifecycle.uses.table().entry(id.clone()).or_default().open += 1;
        Self {
            lifecycle,
            id,
            counts: true,
        }
    }

    /// It came to nothing: the sandbox was not used, and when it was used before stays known.
    pub(super) fn withdraw(mut self) {
        self.counts = false;
    }
}

impl Drop for UseGuard {
    fn drop(&mut self) {
        let mut table = self.lifecycle.uses.table();
        if let Some(found) = table.get_mut(&self.id) {
            found.open = found.open.saturating_sub(1);
            if self.counts {
                found.last_ended_ms = clock::now_ms();
            } else if found.open == 0 && found.last_ended_ms == 0 {
                // It may be an id that nobody has.
                table.remove(&self.id);
            }
        }
    }
}
