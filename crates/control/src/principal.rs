//! Caller of the API: the team that it acts for, and what its key allows.

use std::collections::HashMap;

use parking_lot::Mutex;
use wrenn_db::{Db, Owner};
use wrenn_model::{SandboxId, Scopes, TeamId};

use crate::lifecycle::LifecycleError;

/// Maximum number of sandboxes whose owner is kept in memory.
const MAX_KNOWN: usize = 10_000;

/// Caller, as identified by its API key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// Team that the caller acts for.
    pub team: TeamId,
    /// Id of the API key.
    pub key_id: String,
    /// Scopes of the API key.
    pub scopes: Scopes,
}

/// Check that a sandbox belongs to the team of its caller.
///
/// A sandbox never changes its team, so the answers are kept in memory, and a call does not read
/// the row twice.
#[derive(Debug)]
pub struct Ownership {
    db: Db,
    known: Mutex<HashMap<SandboxId, TeamId>>,
}

impl Ownership {
    /// Returns the check for the sandboxes of a database.
    pub fn new(db: Db) -> Self {
        Self {
            db,
            known: Mutex::default(),
        }
    }

    /// Rejects a sandbox of another team as not found, so that a caller does not learn its id.
    pub async fn require(
        &self,
        principal: &Principal,
        id: &SandboxId,
    ) -> Result<(), LifecycleError> {
        let known = self
            .known
            .lock()
            .get(id)
            .map(|team| *team == principal.team);
        let owned = match known {
            Some(owned) => owned,
            None => self.look_up(&principal.team, id).await?,
        };
        if owned {
            return Ok(());
        }
        Err(LifecycleError::NotFound(id.clone()))
    }

    async fn look_up(&self, team: &TeamId, id: &SandboxId) -> Result<bool, LifecycleError> {
        let Some(row) = self.db.sandbox(Owner::Team(team), id).await? else {
            return Ok(false);
        };
        let mut known = self.known.lock();
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(row.id, row.team);
        Ok(true)
    }
}
