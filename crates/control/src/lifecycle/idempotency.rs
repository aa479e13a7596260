//! Requests with an idempotency key: the same request made again creates no second sandbox. It is
//! answered as the first one was, also after the sandbox has ended.
//!
//! The row stores key and request. This module additionally tracks, while a create is in progress
//! in this process, which handler answers the client. A client whose connection was interrupted may
//! repeat its request while the first handler is still working, or while the first create is being
//! undone.
//!
//! ```text
//!  enter ──► Creating ──── answered by another handler ► Answered ┐
//!               │ │                                               ├──► removed: only the row
//!               │ └──── answered by its own handler ──────────────┤    counts
//!               └─ client disconnected ──► Undoing ───────────────┘
//! ```

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use wrenn_db::{DbError, Sandbox};
use wrenn_model::{SandboxId, SandboxStatus, TeamId};

use super::{LOOK_AGAIN, Lifecycle, LifecycleError};

/// Reason why a request with a key is rejected.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The key belongs to a request with other content.
    #[error("the idempotency key was used for another request")]
    Other,
    /// Another process started the first request, and its result is not known.
    #[error(
        "the outcome of the first request with this idempotency key is unknown; it may have created \
         sandbox `{0}`"
    )]
    OutcomeUnknown(SandboxId),
    /// The first request does not complete in time.
    #[error("the first request with this idempotency key is still in progress")]
    UnderWay,
    /// The database access failed.
    #[error("failed to access the database")]
    Db(#[from] DbError),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Creating,
    Answered,
    Undoing,
}

/// Team, and the idempotency key of its request.
type Key = (TeamId, String);

type Table = HashMap<Key, Stage>;

/// Creates in progress that have a key.
#[derive(Debug, Default)]
pub(super) struct Requests {
    table: Mutex<Table>,
}

/// Right to create a sandbox for a key. Released when dropped.
#[derive(Debug)]
pub struct IdempotencyGuard {
    requests: Arc<Requests>,
    key: Key,
}

/// Result of an earlier request with the same key.
#[derive(Debug)]
pub enum PriorRequest {
    /// There is none. This request may create.
    Nothing(IdempotencyGuard),
    /// The earlier request created this sandbox.
    Made(Box<Sandbox>),
}

impl Requests {
    fn enter(self: &Arc<Self>, key: &Key) -> Option<IdempotencyGuard> {
        let mut table = self.table();
        if table.contains_key(key) {
            return None;
        }
        table.insert(key.clone(), Stage::Creating);
        Some(IdempotencyGuard {
            requests: Arc::clone(self),
            key: key.clone(),
        })
    }

    /// Records that a client received the sandbox. Returns false if the create is being undone or
    /// is no longer in progress.
    fn tell(&self, key: &Key) -> bool {
        match self.table().get_mut(key) {
            Some(Stage::Undoing) | None => false,
            Some(stage) => {
                *stage = Stage::Answered;
                true
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock()
    }
}

impl IdempotencyGuard {
    /// Records that the client of this handler disconnected. Returns true if no other handler has
    /// returned the sandbox, which must then be destroyed.
    pub(super) fn give_up(&self) -> bool {
        let mut table = self.requests.table();
        if table.get(&self.key) == Some(&Stage::Answered) {
            return false;
        }
        table.insert(self.key.clone(), Stage::Undoing);
        true
    }
}

impl Drop for IdempotencyGuard {
    fn drop(&mut self) {
        self.requests.table().remove(&self.key);
    }
}

impl Lifecycle {
    /// Returns the result of the team's earlier request with this key. Waits for one in progress, up
    /// to the limit.
    pub async fn earlier(
        &self,
        team: &TeamId,
        key: &str,
        hash: &str,
        limit: Duration,
    ) -> Result<PriorRequest, RequestError> {
        let entry = (team.clone(), key.to_owned());
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            let mut told = std::pin::pin!(self.changed.notified());
            told.as_mut().enable();
            let ticket = self.requests.enter(&entry);
            let found = self.db.sandbox_by_idempotency_key(team, key).await?;
            if let Some(row) = &found
                && row.options.request_hash != hash
            {
                return Err(RequestError::Other);
            }
            let mut unknown = None;
            match (found, ticket) {
                (None, Some(ticket)) => return Ok(PriorRequest::Nothing(ticket)),
                // The sandbox was created, whatever became of it.
                (Some(row), Some(_)) if row.started_at > 0 => {
                    return Ok(PriorRequest::Made(Box::new(row)));
                }
                (Some(row), Some(ticket)) => match row.status {
                    // No client ever received this sandbox.
                    SandboxStatus::Error | SandboxStatus::Stopped => {
                        self.db.release_idempotency_key(&row.id).await?;
                        return Ok(PriorRequest::Nothing(ticket));
                    }
                    // Created, or left behind, by another process. That process or the reconciler
                    // settles it.
                    _ => unknown = Some(row.id),
                },
                (Some(row), None)
                    if row.status == SandboxStatus::Running && self.requests.tell(&entry) =>
                {
                    return Ok(PriorRequest::Made(Box::new(row)));
                }
                (_, None) => {}
            }
            let now = tokio::time::Instant::now();
            if now >= deadline {
                return Err(unknown.map_or(RequestError::UnderWay, RequestError::OutcomeUnknown));
            }
            let _ = tokio::time::timeout_at(deadline.min(now + LOOK_AGAIN), told).await;
        }
    }

    /// True if a stored row has the idempotency key of this one.
    pub(super) async fn has_request(&self, row: &Sandbox) -> Result<bool, LifecycleError> {
        let key = &row.idempotency_key;
        if key.is_empty() {
            return Ok(false);
        }
        let found = self.db.sandbox_by_idempotency_key(&row.team, key).await?;
        Ok(found.is_some())
    }

    /// Releases the key of a sandbox that no client received.
    pub(super) async fn release_request(&self, id: &SandboxId) {
        if let Err(error) = self.db.release_idempotency_key(id).await {
            // A repeated request is then answered from the row, which never ran or has ended.
            tracing::warn!(sandbox_id = %id, %error, "failed to release the idempotency key");
        }
    }
}
