//! The sandboxes of this host, by id.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use wrenn_proto::SandboxId;

use crate::sandbox::{Sandbox, UseError};

/// All sandboxes that the agent knows. Holds its lock for single operations on the map only.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    sandboxes: Mutex<BTreeMap<SandboxId, Arc<Sandbox>>>,
}

impl Registry {
    /// Adds a sandbox; false if there is one of its id.
    pub(crate) fn insert(&self, sandbox: Arc<Sandbox>) -> bool {
        match self.lock().entry(sandbox.facts.id.clone()) {
            Entry::Occupied(_) => false,
            Entry::Vacant(entry) => {
                entry.insert(sandbox);
                true
            }
        }
    }

    /// The sandbox of an id, as a request gives it.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<Sandbox>, UseError> {
        let not_found = || UseError::NotFound(id.chars().take(80).collect());
        let id: SandboxId = id.parse().map_err(|_| not_found())?;
        self.lock().get(&id).cloned().ok_or_else(not_found)
    }

    pub(crate) fn remove(&self, id: &SandboxId) {
        self.lock().remove(id);
    }

    /// All sandboxes, by id.
    pub(crate) fn list(&self) -> Vec<Arc<Sandbox>> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Arc<Sandbox>>> {
        // No operation leaves the map half-changed.
        self.sandboxes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
