//! Creates in progress in this process.

use std::{collections::HashMap, sync::Arc};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;
use wrenn_model::SandboxId;

/// Progress of a create.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// The row is being written, or a call to the host may be in progress.
    Calling,
    /// No call to the host is in progress, and none will follow.
    CallEnded,
    /// The row holds the result.
    Done,
}

type Table = HashMap<SandboxId, watch::Receiver<Phase>>;

/// Creates in progress.
#[derive(Debug, Default)]
pub(super) struct Creating {
    table: Arc<Mutex<Table>>,
}

/// Create in progress, held by the task that owns it.
#[derive(Debug)]
pub(super) struct CreateEntry {
    id: SandboxId,
    phase: watch::Sender<Phase>,
    table: Arc<Mutex<Table>>,
}

impl Creating {
    /// Registers a create. Returns `None` if this process is already creating a sandbox with this
    /// id.
    pub(super) fn enter(&self, id: &SandboxId) -> Option<CreateEntry> {
        let (phase, receiver) = watch::channel(Phase::Calling);
        let mut table = lock(&self.table);
        if table.contains_key(id) {
            return None;
        }
        table.insert(id.clone(), receiver);
        Some(CreateEntry {
            id: id.clone(),
            phase,
            table: Arc::clone(&self.table),
        })
    }

    pub(super) fn contains(&self, id: &SandboxId) -> bool {
        lock(&self.table).contains_key(id)
    }

    /// Returns the progress of a create, or `None` if there is none with this id.
    pub(super) fn watch(&self, id: &SandboxId) -> Option<watch::Receiver<Phase>> {
        lock(&self.table).get(id).cloned()
    }
}

impl CreateEntry {
    /// Records that no call to the host is in progress, and that none will follow.
    pub(super) fn call_ended(&self) {
        self.phase.send_replace(Phase::CallEnded);
    }
}

impl Drop for CreateEntry {
    fn drop(&mut self) {
        self.phase.send_replace(Phase::Done);
        lock(&self.table).remove(&self.id);
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock()
}
