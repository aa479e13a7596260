//! Creates that this process has under way.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;
use wrenn_proto::SandboxId;

/// How far a create is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Its row is being written, or the host works on it: a call may be on its way.
    Calling,
    /// No call to the host is or will be under way.
    CallEnded,
    /// Its row says how it went.
    Done,
}

type Table = HashMap<SandboxId, watch::Receiver<Phase>>;

/// The creates under way.
#[derive(Debug, Default)]
pub(super) struct Creating {
    table: Arc<Mutex<Table>>,
}

/// A create under way, held by the task that owns it.
#[derive(Debug)]
pub(super) struct CreateEntry {
    id: SandboxId,
    phase: watch::Sender<Phase>,
    table: Arc<Mutex<Table>>,
}

impl Creating {
    /// Enters a create. `None` if this process has one of that name.
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

    /// How far the create of an id is; `None` if there is none.
    pub(super) fn watch(&self, id: &SandboxId) -> Option<watch::Receiver<Phase>> {
        lock(&self.table).get(id).cloned()
    }
}

impl CreateEntry {
    /// Tells that the host is not, and will not be, called.
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
    table.lock().unwrap_or_else(PoisonError::into_inner)
}
