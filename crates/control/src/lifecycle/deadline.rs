//! Deadlines: ends or pauses sandboxes at the end of their lifetime, whether they are in use or
//! not.
//!
//! Owns one task that sleeps until the nearest deadline, or until it is notified of a nearer one. A
//! deadline is checked again under the sandbox's lock, so one that was moved at the last moment
//! counts as moved. A failed pause is retried with increasing delays (`idle`). A failed destroy
//! is left to the reconciler.

use std::{collections::HashSet, sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use thiserror_ext::AsReport as _;
use tokio_util::sync::CancellationToken;
use wrenn_db::Sandbox;
use wrenn_model::{OnTimeout, SandboxId, SandboxStatus};

use super::{Lifecycle, LifecycleError};
use crate::clock;

type Marks = Arc<Mutex<HashSet<SandboxId>>>;

/// Maximum number of deadlines read at once. Later ones are read when these are done.
const MAX_ROWS: u32 = 1000;

/// Maximum sleep. Another process may have set a deadline, or the clock may have been changed.
const MAX_SLEEP_MS: i64 = 30_000;

/// Sleep after a database failure.
const AFTER_FAILURE_MS: i64 = 1000;

/// Maximum time that a caller who ends a sandbox at once waits for the end to start.
const BEGIN_WAIT: Duration = Duration::from_secs(5);

impl Lifecycle {
    /// Ends or pauses sandboxes whose deadline has passed, until shutdown.
    pub async fn keep_deadlines(self: Arc<Self>, shutdown: CancellationToken) {
        let under_way = Marks::default();
        loop {
            let sleep_ms = match self.db.expiring(MAX_ROWS).await {
                Ok(rows) => self.begin_due(&rows, &under_way),
                Err(error) => {
                    tracing::error!(%error, "failed to read the deadlines");
                    AFTER_FAILURE_MS
                }
            };
            let sleep = Duration::from_millis(u64::try_from(sleep_ms).unwrap_or(0));
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.deadlines.notified() => {}
                () = tokio::time::sleep(sleep) => {}
            }
        }
    }

    /// Starts to expire the sandboxes that are due. Returns the milliseconds until the next
    /// deadline.
    fn begin_due(self: &Arc<Self>, rows: &[Sandbox], under_way: &Marks) -> i64 {
        let now = clock::now_ms();
        let mut next = now + MAX_SLEEP_MS;
        let here = |row: &&Sandbox| self.fleet.connected(&row.host_id).is_some();
        for row in rows.iter().filter(here) {
            let due = row.expires_at.max(self.idle.not_before_ms(&row.id));
            if due > now {
                next = next.min(due);
                continue;
            }
            let Some(mark) = Mark::set(under_way, &row.id) else {
                continue;
            };
            let (lifecycle, id) = (Arc::clone(self), row.id.clone());
            self.spawn(async move {
                if let Err(error) = lifecycle.expire(&id).await {
                    tracing::warn!(sandbox_id = %id, error = %error.as_report(), "failed to expire the sandbox");
                }
                drop(mark);
                // The time of the next attempt is known only now.
                lifecycle.deadlines.notify_one();
            });
        }
        next - now
    }

    /// Performs the action of the deadline, if the deadline has passed.
    async fn expire(&self, id: &SandboxId) -> Result<(), LifecycleError> {
        let _lock = self.locks.lock(id).await;
        let Err(error) = self.expire_locked(id).await else {
            return Ok(());
        };
        self.pause_failed(id, &error, "lifetime expired").await;
        Err(error)
    }

    async fn expire_locked(&self, id: &SandboxId) -> Result<(), LifecycleError> {
        let row = self.get(id).await?;
        let over = row.expires_at > 0 && row.expires_at <= clock::now_ms();
        if row.status != SandboxStatus::Running || !over {
            return Ok(());
        }
        tracing::info!(sandbox_id = %id, on_timeout = row.on_timeout.as_str(), "lifetime expired");
        match row.on_timeout {
            OnTimeout::Kill => self.destroy_locked(id, "lifetime expired").await,
            OnTimeout::Pause => self.pause_locked(id, row.options.disk_only).await.map(drop),
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
        self.deadlines.notify_one();
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
