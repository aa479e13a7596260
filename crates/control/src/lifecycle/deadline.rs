//! Deadlines: what becomes of a sandbox when its lifetime is over, used or not.
//!
//! Owns one task that sleeps until the nearest deadline, or until it is told of a nearer one. A deadline is looked at once
//! more under the sandbox's lock, so one that was moved in the last moment counts as moved. A pause that fails is tried
//! again, each time later (`reaping`); a destroy that fails is the reconciler's.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio_util::sync::CancellationToken;
use wrenn_proto::{
    SandboxId,
    rest::{OnTimeout, SandboxStatus},
};

use super::{Lifecycle, LifecycleError, create::error_chain};
use crate::{clock, db::sandboxes::Sandbox};

type Marks = Arc<Mutex<HashSet<SandboxId>>>;

/// Deadlines read in one go. Those behind them are read when these are done.
const MAX_ROWS: u32 = 1000;

/// How long to sleep at most: another process may have set a deadline, or the clock may have been set.
const MAX_SLEEP_MS: i64 = 30_000;

/// How long to sleep when the database fails.
const AFTER_FAILURE_MS: i64 = 1000;

/// How long one who ends a sandbox at once waits to see it begin.
const BEGIN_WAIT: Duration = Duration::from_secs(5);

impl Lifecycle {
    /// Ends or pauses what has lived its time, until told to stop.
    pub(crate) async fn keep_deadlines(self: Arc<Self>, shutdown: CancellationToken) {
        let under_way = Marks::default();
        loop {
            let sleep_ms = match self.db.expiring(MAX_ROWS).await {
                Ok(rows) => self.begin_due(&rows, &under_way),
                Err(error) => {
                    tracing::error!(%error, "cannot read the deadlines");
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

    /// Begins with those whose time has come; milliseconds until the next one's.
    fn begin_due(self: &Arc<Self>, rows: &[Sandbox], under_way: &Marks) -> i64 {
        let now = clock::now_ms();
        let mut next = now + MAX_SLEEP_MS;
        for row in rows {
            let due = row.expires_at.max(self.reaping.not_before_ms(&row.id));
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
                    tracing::warn!(sandbox_id = %id, error = %error_chain(&error), "cannot end a lifetime now");
                }
                drop(mark);
                // The next attempt's time is known only now.
                lifecycle.deadlines.notify_one();
            });
        }
        next - now
    }

    /// Does what is to be done at the deadline, if that has come.
    async fn expire(&self, id: &SandboxId) -> Result<(), LifecycleError> {
        let _lock = self.locks.lock(id).await;
        let Err(error) = self.expire_locked(id).await else {
            return Ok(());
        };
        self.pause_failed(id, &error, "its lifetime is over").await;
        Err(error)
    }

    async fn expire_locked(&self, id: &SandboxId) -> Result<(), LifecycleError> {
        let row = self.get(id).await?;
        let over = row.expires_at > 0 && row.expires_at <= clock::now_ms();
        if row.status != SandboxStatus::Running || !over {
            return Ok(());
        }
        tracing::info!(sandbox_id = %id, on_timeout = row.on_timeout.as_str(), "a lifetime is over");
        match row.on_timeout {
            OnTimeout::Kill => self.destroy_locked(id, "its lifetime was over").await,
            OnTimeout::Pause => self.pause_locked(id, row.options.disk_only).await.map(drop),
        }
    }

    /// Sets how long from now a sandbox that runs shall live. With 0 its end has begun when this answers.
    pub(crate) async fn set_lifetime(
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
        self.reaping.forget(id);
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

/// A sandbox whose end is under way: it is begun once.
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
    all.lock().unwrap_or_else(PoisonError::into_inner)
}
