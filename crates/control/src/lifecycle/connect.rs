//! Coming back to a sandbox: one that runs lives longer, one that is paused is resumed; never is its life made shorter.
//!
//! All under the sandbox's lock: a pause, a resume or a copy that is under way is waited for, and a deadline that is met at
//! the same moment counts either before or after.

use std::{sync::Arc, time::Duration};

use wrenn_proto::{SandboxId, rest::SandboxStatus};

use super::{LOOK_AGAIN, Lifecycle, LifecycleError};
use crate::{
    agent_client::{AgentError, FREEZE_TIMEOUT},
    clock,
    db::{options::ResumeAs, sandboxes::Sandbox},
};

/// How long a sandbox that still boots is waited for.
const BOOT_WAIT: Duration = Duration::from_secs(120);

/// What is wanted of a sandbox.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Connection {
    /// Seconds from now that it shall live at least.
    pub(crate) lifetime_sec: u32,
    /// If it is paused: boot from its disk.
    pub(crate) disk_only: bool,
}

/// What it was.
#[derive(Debug)]
pub(crate) enum Connected {
    /// It ran.
    Found(Sandbox),
    /// It was paused, and runs again.
    Resumed(Sandbox),
}

impl Lifecycle {
    /// Makes a sandbox run, and live for the given time at least. Goes on if the caller goes away.
    pub(crate) async fn connect(
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
            // Before the row is read: a change in between is then told, not missed.
            told.as_mut().enable();
            let deadline = {
                let _lock = self.locks.lock(id).await;
                let row = self.get(id).await?;
                match row.status {
                    SandboxStatus::Running => {
                        return self.live_longer(id, wanted).await.map(Connected::Found);
                    }
                    SandboxStatus::Paused => {
                        return self.resume_for(row, wanted).await.map(Connected::Resumed);
                    }
                    SandboxStatus::Pending | SandboxStatus::Starting => begun + BOOT_WAIT,
                    // With the lock free, whoever began it has left it to the reconciler.
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

    /// One without a deadline lives as long as it is used, and keeps that.
    async fn live_longer(
        &self,
        id: &SandboxId,
        wanted: Connection,
    ) -> Result<Sandbox, LifecycleError> {
        let until = clock::now_ms() + i64::from(wanted.lifetime_sec) * 1000;
        let row = self.get(id).await?;
        if row.expires_at == 0 || row.expires_at >= until {
            return Ok(row);
        }
        self.change(id, |row| row.expires_at = row.expires_at.max(until))
            .await
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

    /// Makes a sandbox that runs live for at least this long from now, if it has a deadline.
    pub(crate) async fn extend(
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

    /// The row, if it has the status.
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
