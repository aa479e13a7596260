//! Connecting to a sandbox: extends the life of a running sandbox and resumes a paused one. Never
//! shortens a life.
//!
//! Everything happens under the sandbox's lock. A pause, a resume or a copy in progress is waited
//! for, and a concurrent deadline takes effect either before or after.

use std::{sync::Arc, time::Duration};

use wrenn_db::{ResumeAs, Sandbox};
use wrenn_model::{SandboxId, SandboxStatus};

use super::{LOOK_AGAIN, Lifecycle, LifecycleError};
use crate::{
    agent_client::{AgentError, FREEZE_TIMEOUT},
    clock,
};

/// Maximum time to wait for a sandbox that is booting.
const BOOT_WAIT: Duration = Duration::from_secs(120);

/// Parameters of a connect.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    /// Minimum remaining lifetime, in seconds from now.
    pub lifetime_sec: u32,
    /// If the sandbox is paused, boot it from its disk.
    pub disk_only: bool,
}

/// Result of a connect.
#[derive(Debug)]
pub enum Connected {
    /// The sandbox was running.
    Found(Sandbox),
    /// The sandbox was paused and runs again.
    Resumed(Sandbox),
}

impl Lifecycle {
    /// Brings a sandbox to `running`, with at least the given lifetime. Completes even if the
    /// caller disconnects.
    pub async fn connect(
        self: &Arc<Self>,
        id: &SandboxId,
        wanted: Connection,
    ) -> Result<Connected, LifecycleError> {
        let (lifecycle, id) = (Arc::clone(self), id.clone());
        let task = self.spawn(async move { lifecycle.connect_when_settled(&id, wanted).await });
        task.await
            .unwrap_or_else(|_| Err(AgentError::task_ended("resume").into()))
    }

    async fn connect_when_settled(
        &self,
        id: &SandboxId,
        wanted: Connection,
    ) -> Result<Connected, LifecycleError> {
        let begun = tokio::time::Instant::now();
        loop {
            let mut told = std::pin::pin!(self.changed.notified());
            // Enabled before the row is read, so that a change in between is not missed.
            told.as_mut().enable();
            let deadline = {
                let lock = self.locks.lock(id).await;
                let row = self.get(id).await?;
                match row.status {
                    SandboxStatus::Running => {
                        return self.live_longer(id, wanted).await.map(Connected::Found);
                    }
                    SandboxStatus::Paused => {
                        let resumed = lock.give_way(self.resume_for(row, wanted)).await;
                        return resumed.map(Connected::Resumed);
                    }
                    SandboxStatus::Pending | SandboxStatus::Starting => begun + BOOT_WAIT,
                    // The lock is free, so the task that started this has left it to the
                    // reconciler.
                    SandboxStatus::Pausing | SandboxStatus::Resuming => begun + FREEZE_TIMEOUT,
                    SandboxStatus::Stopping | SandboxStatus::Stopped | SandboxStatus::Error => {
                        return Err(LifecycleError::wrong_status(&row, "running` or `paused"));
                    }
                }
            };
            let now = tokio::time::Instant::now();
            if now >= deadline {
                return Err(LifecycleError::Busy(id.clone()));
            }
            let _ = tokio::time::timeout_at(deadline.min(now + LOOK_AGAIN), told).await;
        }
    }

    /// Extends the deadline. A sandbox without a deadline lives as long as it is used, and stays
    /// so.
    async fn live_longer(
        &self,
        id: &SandboxId,
        wanted: Connection,
    ) -> Result<Sandbox, LifecycleError> {
        let row = self.get(id).await?;
        self.note_deadline(&row);
        let wanted = Duration::from_secs(wanted.lifetime_sec.into());
        // Not known for a sandbox of another host, whose agent rejects other calls as well.
        let is_longer = self.deadlines.left(id).is_none_or(|left| left >= wanted);
        if row.expires_at == 0 || is_longer {
            return Ok(row);
        }
        let known = row.expires_at;
        let until = clock::now_ms() + i64::try_from(wanted.as_millis()).unwrap_or(i64::MAX);
        let set = self.change(id, |row| {
            // The wall clock may have been set back since the deadline was set.
            let is_known = row.expires_at == known;
            row.expires_at = if is_known {
                until
            } else {
                row.expires_at.max(until)
            };
        });
        set.await
    }

    async fn resume_for(
        &self,
        row: Sandbox,
        wanted: Connection,
    ) -> Result<Sandbox, LifecycleError> {
        let how = ResumeAs {
            disk_only: wanted.disk_only,
            lifetime_sec: (row.options.lifetime_sec > 0 || row.expires_at > 0)
                .then_some(wanted.lifetime_sec),
        };
        self.resume_locked(&row.id, how).await
    }

    /// Extends the deadline of a running sandbox to at least this long from now, if it has one.
    pub async fn extend(
        &self,
        id: &SandboxId,
        lifetime_sec: u32,
    ) -> Result<Sandbox, LifecycleError> {
        let _lock = self.locks.lock(id).await;
        self.require_status(id, SandboxStatus::Running, "running")
            .await?;
        let wanted = Connection {
            lifetime_sec,
            disk_only: false,
        };
        self.live_longer(id, wanted).await
    }

    /// Returns the row if it has the status.
    pub(super) async fn require_status(
        &self,
        id: &SandboxId,
        status: SandboxStatus,
        wanted: &'static str,
    ) -> Result<Sandbox, LifecycleError> {
        let row = self.get(id).await?;
        if row.status == status {
            return Ok(row);
        }
        Err(LifecycleError::wrong_status(&row, wanted))
    }
}
