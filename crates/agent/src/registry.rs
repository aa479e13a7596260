//! Sandboxes of this host, by ID.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

use parking_lot::{Mutex, MutexGuard};
use wrenn_model::SandboxId;

use crate::sandbox::{Sandbox, UseError};

/// All sandboxes known to the agent. The lock is held only for single operations on the map.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    sandboxes: Mutex<BTreeMap<SandboxId, Arc<Sandbox>>>,
}

impl Registry {
    /// Adds a sandbox. Returns false if the ID is taken.
    pub(crate) fn insert(&self, sandbox: Arc<Sandbox>) -> bool {
        match self.lock().entry(sandbox.facts.id.clone()) {
            Entry::Occupied(_) => false,
            Entry::Vacant(entry) => {
                entry.insert(sandbox);
                true
            }
        }
    }

    /// Returns the sandbox with an ID taken from a request.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<Sandbox>, UseError> {
        let not_found = || UseError::NotFound(id.chars().take(80).collect());
        let id: SandboxId = id.parse().map_err(|_| not_found())?;
        self.lock().get(&id).cloned().ok_or_else(not_found)
    }

    pub(crate) fn remove(&self, id: &SandboxId) {
        self.lock().remove(id);
    }

    /// Returns all sandboxes, sorted by ID.
    pub(crate) fn list(&self) -> Vec<Arc<Sandbox>> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Arc<Sandbox>>> {
        // No operation leaves the map half-changed.
        self.sandboxes.lock()
    }
}
