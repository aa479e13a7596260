//! Deadlines: ends or pauses sandboxes at the end of their lifetime, whether they are in use or
//! not.
//!
//! Owns one task that sleeps until the nearest deadline, or until it is notified of a nearer one.
//! Deadlines are measured by the monotonic clock (`table`): a step of the wall clock is logged, and
//! moves none of them. A deadline is checked again under the sandbox's lock, so one that was moved
//! at the last moment counts as moved. At most [`MAX_ENDS_AT_ONCE`] sandboxes are ended at the same
//! time, together with the idle ones: after a long outage, many are due. A failed pause is retried
//! with increasing delays and more effort (`idle`). A failed destroy is left to the reconciler.

mod table;

use std::{collections::HashSet, sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use thiserror_ext::AsReport as _;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tokio_util::sync::CancellationToken;
use wrenn_db::{DbError, Sandbox};
use wrenn_model::{OnTimeout, SandboxId, SandboxStatus};

use super::{Lifecycle, LifecycleError};
use crate::clock::{self, StepWatch};

pub(super) use table::Deadlines;

type Marks = Arc<Mutex<HashSet<SandboxId>>>;

/// Time after which a sandbox that was locked at its deadline is tried again.
const LOCKED_RETRY: Duration = Duration::from_secs(1);

/// Maximum number of sandboxes that are paused or destroyed at the same time because their time is
/// over.
pub const MAX_ENDS_AT_ONCE: usize = 16;

/// Interval at which all deadlines are read. Another process may have set one.
const SYNC_EVERY: Duration = Duration::from_secs(30);

/// Delay of the next read after a database failure.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Maximum time that a caller who ends a sandbox at once waits for the end to start.
const BEGIN_WAIT: Duration = Duration::from_secs(5);

impl Lifecycle {
    /// Ends or pauses sandboxes whose deadline has passed, until shutdown.
    pub async fn keep_deadlines(self: Arc<Self>, shutdown: CancellationToken) {
        let under_way = Marks::default();
        let mut steps = StepWatch::new();
        let mut next_sync = Instant::now();
        loop {
            if let Some(step_ms) = steps.look() {
                tracing::warn!(
                    step_ms,
                    "wall clock stepped, deadlines and idle times not moved"
                );
            }
            if Instant::now() >= next_sync {
                let synced = self.sync_deadlines().await;
                next_sync = Instant::now()
                    + if synced.is_ok() {
                        SYNC_EVERY
                    } else {
                        AFTER_FAILURE
                    };
                if let Err(error) = synced {
                    tracing::error!(%error, "failed to read the deadlines");
                }
            }
            let next_due = self.begin_due(&under_way);
            let wake = next_due.map_or(next_sync, |due| due.min(next_sync));
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.deadline_changed.notified() => {}
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    async fn sync_deadlines(&self) -> Result<(), DbError> {
        let read_at = Instant::now();
        let mut rows = self.db.deadlines().await?;
        rows.retain(|row| self.fleet.connected(&row.host_id).is_some());
        self.deadlines.sync(&rows, read_at);
        Ok(())
    }

    /// Takes over the deadline of a row that was read or written.
    pub(super) fn note_deadline(&self, row: &Sandbox) {
        if self.fleet.connected(&row.host_id).is_some() {
            self.deadlines.note(row);
        }
    }

    /// Returns the right to end one more sandbox whose time is over; `None` if
    /// [`MAX_ENDS_AT_ONCE`] sandboxes are being ended.
    pub(crate) fn try_begin_end(self: &Arc<Self>) -> Option<EndGuard> {
        let permit = Arc::clone(&self.ends).try_acquire_owned().ok()?;
        Some(EndGuard {
            lifecycle: Arc::clone(self),
            permit: Some(permit),
        })
    }

    /// Starts to expire the sandboxes that are due, as many as possible. Returns the next deadline.
    fn begin_due(self: &Arc<Self>, under_way: &Marks) -> Option<Instant> {
        let now = Instant::now();
        let mut next: Option<Instant> = None;
        for (due, id) in self.deadlines.all() {
            let due = self.idle.not_before(&id).map_or(due, |at| at.max(due));
            if due > now {
                next = Some(next.map_or(due, |next| next.min(due)));
                continue;
            }
            // Another operation on the sandbox may take minutes. It must not use up the turns of
            // others.
            if self.locks.try_lock(&id).is_none() {
                let retry = now + LOCKED_RETRY;
                next = Some(next.map_or(retry, |next| next.min(retry)));
                continue;
            }
            let Some(mark) = Mark::set(under_way, &id) else {
                continue;
            };
            // The end of another one notifies this task.
            let Some(ending) = self.try_begin_end() else {
                continue;
            };
            let lifecycle = Arc::clone(self);
            self.spawn(async move {
                if let Err(error) = lifecycle.expire(&id).await {
                    tracing::warn!(sandbox_id = %id, error = %error.as_report(), "failed to expire the sandbox");
                }
                drop(mark);
                // Notifies this module's task: the time of the next attempt is known only now.
                drop(ending);
            });
        }
        next
    }

    /// Performs the action of the deadline, if the deadline has passed.
    async fn expire(&self, id: &SandboxId) -> Result<(), LifecycleError> {
        let lock = self.locks.lock(id).await;
        let expire = async {
            let deadline_ms = self.deadlines.expires_at(id);
            let Err(error) = self.expire_locked(id, deadline_ms).await else {
                return Ok(());
            };
            self.pause_failed(id, deadline_ms, &error, "lifetime expired")
                .await;
            Err(error)
        };
        lock.give_way(expire).await
    }

    async fn expire_locked(&self, id: &SandboxId, deadline_ms: i64) -> Result<(), LifecycleError> {
        let row = match self.get(id).await {
            Err(LifecycleError::NotFound(_)) => {
                self.deadlines.forget(id);
                return Ok(());
            }
            row => row?,
        };
        self.note_deadline(&row);
        if row.status != SandboxStatus::Running || !self.deadlines.is_due(id) {
            return Ok(());
        }
        tracing::info!(sandbox_id = %id, on_timeout = row.on_timeout.as_str(), "lifetime expired");
        match row.on_timeout {
            OnTimeout::Kill => self.destroy_locked(id, "lifetime expired").await,
            OnTimeout::Pause => {
                let effort = self.idle.effort(id, deadline_ms);
                let paused = self.pause_locked(id, row.options.disk_only, effort);
                paused.await.map(drop)
            }
        }
    }

    /// Sets the remaining lifetime of a running sandbox. With 0, its end has started when this
    /// returns.
    pub async fn set_lifetime(
        &self,
        id: &SandboxId,
        lifetime_sec: u32,
    ) -> Result<Sandbox, LifecycleError> {
        let row = {
            let _lock = self.locks.lock(id).await;
            self.require_status(id, SandboxStatus::Running, "running")
                .await?;
            let expires_at = clock::now_ms() + i64::from(lifetime_sec) * 1000;
            let set = self.change(id, |row| {
                row.expires_at = expires_at;
                if row.options.lifetime_sec == 0 {
                    row.options.lifetime_sec = lifetime_sec;
                }
            });
            set.await?
        };
        self.idle.forget(id);
        self.deadline_changed.notify_one();
        if lifetime_sec == 0 {
            let _ = tokio::time::timeout(BEGIN_WAIT, self.until_not_running(id)).await;
        }
        Ok(row)
    }

    async fn until_not_running(&self, id: &SandboxId) {
        loop {
            let mut told = std::pin::pin!(self.changed.notified());
            told.as_mut().enable();
            match self.get(id).await {
                Ok(row) if row.status == SandboxStatus::Running => told.await,
                _ => return,
            }
        }
    }
}

/// Right to end a sandbox whose time is over. Its end is the turn of another one.
pub(crate) struct EndGuard {
    lifecycle: Arc<Lifecycle>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.permit = None;
        self.lifecycle.deadline_changed.notify_one();
    }
}

/// Mark of a sandbox that is being expired. Each end is started only once.
struct Mark {
    all: Marks,
    id: SandboxId,
}

impl Mark {
    fn set(all: &Marks, id: &SandboxId) -> Option<Self> {
        let new = lock(all).insert(id.clone());
        new.then(|| Self {
            all: Arc::clone(all),
            id: id.clone(),
        })
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        lock(&self.all).remove(&self.id);
    }
}

fn lock(all: &Mutex<HashSet<SandboxId>>) -> MutexGuard<'_, HashSet<SandboxId>> {
    all.lock()
}
