//! Requests that name themselves by an idempotency key, so that the same one made again makes no other sandbox.
//!
//! The row remembers key and request; this remembers, for as long as a create is under way here, who answers for it. A
//! client whose connection broke asks again while the first handler still works, or while what it began is being undone.
//!
//! ```text
//!  enter ──► Creating ──── told elsewhere ───► Told ──┐
//!               │ │                                   ├──► gone: the row alone says what is
//!               │ └───── told by its own handler ─────┤
//!               └─ its client left ─► Undoing ────────┘
//! ```

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use wrenn_proto::{SandboxId, rest::SandboxStatus};

use super::{LOOK_AGAIN, Lifecycle, LifecycleError};
use crate::db::{DbError, sandboxes::Sandbox};

/// How long the first request is waited for: what a create may take, and its undoing.
const LIMIT: Duration = Duration::from_secs(150);

/// Why a request with a key is not carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// The key belongs to a request with another content.
    #[error("this idempotency key was used for another request")]
    Other,
    /// What the first request made has been, and is no more.
    #[error("the sandbox `{0}` that this idempotency key has made has ended")]
    Ended(SandboxId),
    /// The first request does not come to an end.
    #[error("the first request with this idempotency key is still under way")]
    UnderWay,
    /// The database failed.
    #[error("the database failed")]
    Db(#[from] DbError),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Creating,
    Told,
    Undoing,
}

type Table = HashMap<String, Stage>;

/// Creates with a key that are under way.
#[derive(Debug, Default)]
pub(super) struct Requests {
    table: Mutex<Table>,
}

/// The right to create for a key; given back when dropped.
#[derive(Debug)]
pub(crate) struct Ticket {
    requests: Arc<Requests>,
    key: String,
}

/// What an earlier request with the same key has come to.
#[derive(Debug)]
pub(crate) enum Earlier {
    /// There was none: this one may create.
    Nothing(Ticket),
    /// It has made this sandbox.
    Made(Box<Sandbox>),
}

impl Requests {
    fn enter(self: &Arc<Self>, key: &str) -> Option<Ticket> {
        let mut table = self.table();
        if table.contains_key(key) {
            return None;
        }
        table.insert(key.to_owned(), Stage::Creating);
        Some(Ticket {
            requests: Arc::clone(self),
            key: key.to_owned(),
        })
    }

    /// Notes that a client was told of the sandbox. False if that is being undone, or is over.
    fn tell(&self, key: &str) -> bool {
        match self.table().get_mut(key) {
            Some(Stage::Undoing) | None => false,
            Some(stage) => {
                *stage = Stage::Told;
                true
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket {
    /// The client of this handler left. True if nobody else has told it of the sandbox, which is then to be undone.
    pub(super) fn give_up(&self) -> bool {
        let mut table = self.requests.table();
        if table.get(&self.key) == Some(&Stage::Told) {
            return false;
        }
        table.insert(self.key.clone(), Stage::Undoing);
        true
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.requests.table().remove(&self.key);
    }
}

impl Lifecycle {
    /// What has come of an earlier request with this key, waiting for one that is under way.
    pub(crate) async fn earlier(&self, key: &str, hash: &str) -> Result<Earlier, RequestError> {
        let deadline = tokio::time::Instant::now() + LIMIT;
        loop {
            let mut told = std::pin::pin!(self.changed.notified());
            told.as_mut().enable();
            let ticket = self.requests.enter(key);
            let found = self.db.sandbox_by_idempotency_key(key).await?;
            if let Some(row) = &found
                && row.options.request_hash != hash
            {
                return Err(RequestError::Other);
            }
            match (found, ticket) {
                (None, Some(ticket)) => return Ok(Earlier::Nothing(ticket)),
                (Some(row), Some(ticket)) => match row.status {
                    SandboxStatus::Running
                    | SandboxStatus::Pausing
                    | SandboxStatus::Paused
                    | SandboxStatus::Resuming => return Ok(Earlier::Made(Box::new(row))),
                    // It never was its client's.
                    SandboxStatus::Error | SandboxStatus::Stopped if row.started_at == 0 => {
                        self.db.release_idempotency_key(&row.id).await?;
                        return Ok(Earlier::Nothing(ticket));
                    }
                    SandboxStatus::Stopping | SandboxStatus::Stopped | SandboxStatus::Error => {
                        return Err(RequestError::Ended(row.id));
                    }
                    // Left by another process, or created by it: the reconciler or that process settles it.
                    SandboxStatus::Pending | SandboxStatus::Starting => {}
                },
                (Some(row), None)
                    if row.status == SandboxStatus::Running && self.requests.tell(key) =>
                {
                    return Ok(Earlier::Made(Box::new(row)));
                }
                (_, None) => {}
            }
            let now = tokio::time::Instant::now();
            if now >= deadline {
                return Err(RequestError::UnderWay);
            }
            let _ = tokio::time::timeout_at(deadline.min(now + LOOK_AGAIN), told).await;
        }
    }

    /// Whether a row has this key.
    pub(super) async fn has_request(&self, key: &str) -> Result<bool, LifecycleError> {
        if key.is_empty() {
            return Ok(false);
        }
        Ok(self.db.sandbox_by_idempotency_key(key).await?.is_some())
    }

    /// Frees the key of a sandbox that no client was told of.
    pub(super) async fn release_request(&self, id: &SandboxId) {
        if let Err(error) = self.db.release_idempotency_key(id).await {
            // The same request is then answered from the row: it never ran, or has ended.
            tracing::warn!(sandbox_id = %id, %error, "cannot free an idempotency key");
        }
    }
}
