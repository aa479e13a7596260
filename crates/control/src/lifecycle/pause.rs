//! Pause and resume: under the sandbox's lock, in a separate task, marked in the row before the
//! host is called.
//!
//! The host's report decides. If a call fails or its reply is lost, the host is asked for the
//! current state of the sandbox. If the host does not answer that either, the row stays `pausing`
//! or `resuming`, and the reconciler settles it.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::Shared};
use thiserror_ext::AsReport as _;
use wrenn_db::{ResumeAs, Sandbox};
use wrenn_model::{SandboxId, SandboxStatus};
use wrenn_proto::rpc::hostagent::v1::{SandboxInfo, SandboxState};

use super::{Lifecycle, LifecycleError, WRITE_ATTEMPTS, WRITE_PAUSE, told};
use crate::{
    agent_client::AgentError,
    clock,
    lifecycle::{fill_from_host, resumed_from_host},
    state_machine::Event,
};

/// Resume that callers share: one call to the host, one result for all.
pub(super) type SharedResume =
    Shared<futures::future::BoxFuture<'static, Result<(), Arc<LifecycleError>>>>;

/// Minimum lifetime after a resume that was started by a call, in seconds. A sandbox with a
/// lifetime of a few seconds must not end in the middle of the call that woke it.
const MIN_WOKEN_SEC: u32 = 300;

/// Maximum time for calls to the guest in progress to complete before a pause.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// Operation requested from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Pause,
    Resume,
}

impl Lifecycle {
    /// Pauses a running sandbox. With `disk_only`, a later resume boots from the disk and ignores
    /// the memory. Completes even if the caller disconnects.
    pub async fn pause(
        self: &Arc<Self>,
        id: &SandboxId,
        disk_only: bool,
    ) -> Result<Sandbox, LifecycleError> {
        let (lifecycle, id) = (Arc::clone(self), id.clone());
        let task = self.spawn(async move {
            let _lock = lifecycle.locks.lock(&id).await;
            lifecycle.pause_locked(&id, disk_only).await
        });
        task.await
            .unwrap_or_else(|_| Err(AgentError::task_ended("pause").into()))
    }

    /// Like [`pause`](Self::pause). The caller holds the lock.
    pub(super) async fn pause_locked(
        &self,
        id: &SandboxId,
        disk_only: bool,
    ) -> Result<Sandbox, LifecycleError> {
        self.begin_pause(id, disk_only).await?;
        self.pause_begun(id).await
    }

    /// Pauses a sandbox whose row is already marked `pausing`. Calls to its guest in progress may
    /// complete first; the agent cuts off those that take longer.
    pub(super) async fn pause_begun(&self, id: &SandboxId) -> Result<Sandbox, LifecycleError> {
        self.guests.drain(id, DRAIN_LIMIT).await;
        match self.agent.pause(id.as_str()).await {
            Ok(_) => {
                self.write(id, Event::PauseDone, |row| row.warning.clear())
                    .await
            }
            Err(error) => self.after_failure(id, Step::Pause, error).await,
        }
    }

    /// Resumes a paused sandbox. Completes even if the caller disconnects.
    pub async fn resume(self: &Arc<Self>, id: &SandboxId) -> Result<Sandbox, LifecycleError> {
        let (lifecycle, id) = (Arc::clone(self), id.clone());
        let task = self.spawn(async move {
            let _lock = lifecycle.locks.lock(&id).await;
            lifecycle.resume_locked(&id, ResumeAs::default()).await
        });
        task.await
            .unwrap_or_else(|_| Err(AgentError::task_ended("resume").into()))
    }

    /// Like [`resume`](Self::resume). The caller holds the lock.
    pub(super) async fn resume_locked(
        &self,
        id: &SandboxId,
        how: ResumeAs,
    ) -> Result<Sandbox, LifecycleError> {
        let row = self
            .begin(id, Event::ResumeBegun, "paused", |row| {
                row.options.resuming = Some(how);
            })
            .await?;
        // The pause's setting stays in the row, next to the settings of this resume. After a
        // failure, the next resume uses the pause's setting.
        let disk_only = row.options.paused_disk_only || how.disk_only;
        match self.agent.resume(id.as_str(), disk_only).await {
            Ok(info) => {
                self.write(id, Event::ResumeDone, |row| resumed_from_host(row, &info))
                    .await
            }
            Err(error) => self.after_failure(id, Step::Resume, error).await,
        }
    }

    /// Resumes a sandbox for a call to it. Concurrent callers share one attempt and its result.
    pub(super) fn resume_shared(self: &Arc<Self>, id: &SandboxId) -> SharedResume {
        let mut table = self.resumes();
        let begun = table.entry(id.clone()).or_insert_with(|| {
            let (lifecycle, id) = (Arc::clone(self), id.clone());
            let task = self.spawn(async move {
                // Removed when the task ends, for any reason, so that the next caller starts a new
                // attempt.
                let _entry = Entry(&lifecycle, &id);
                lifecycle.resume_if_paused(&id).await.map_err(Arc::new)
            });
            task.map(|done| {
                done.unwrap_or_else(|_| Err(Arc::new(AgentError::task_ended("resume").into())))
            })
            .boxed()
            .shared()
        });
        begun.clone()
    }

    /// Returns the attempt in progress, if a call started it.
    pub(super) fn resume_under_way(&self, id: &SandboxId) -> Option<SharedResume> {
        self.resumes().get(id).cloned()
    }

    /// Resumes the sandbox if it is still paused once the lock is held. If it is not, the caller
    /// re-reads the row.
    async fn resume_if_paused(&self, id: &SandboxId) -> Result<(), LifecycleError> {
        let _lock = self.locks.lock(id).await;
        let row = self.get(id).await?;
        if row.status == SandboxStatus::Paused && row.wakes() {
            tracing::info!(sandbox_id = %id, "resuming for a call");
            let lifetime_sec = row.options.lifetime_sec;
            let how = ResumeAs {
                disk_only: false,
                lifetime_sec: (lifetime_sec > 0).then_some(lifetime_sec.max(MIN_WOKEN_SEC)),
            };
            self.resume_locked(id, how).await?;
        }
        Ok(())
    }

    /// Marks a running sandbox as about to be paused. New callers wait or are rejected.
    pub(super) async fn begin_pause(
        &self,
        id: &SandboxId,
        disk_only: bool,
    ) -> Result<Sandbox, LifecycleError> {
        self.begin(id, Event::PauseBegun, "running", |row| {
            row.options.paused_disk_only = disk_only;
        })
        .await
    }

    /// Removes that mark. The sandbox keeps running.
    pub(super) async fn unmark_pause(&self, id: &SandboxId) -> Result<(), LifecycleError> {
        self.write(id, Event::PauseFailed, |_| ()).await.map(drop)
    }

    /// Marks the row before the host is called. `change` writes the parameters of the call, so that
    /// they are known when the row is settled later.
    async fn begin(
        &self,
        id: &SandboxId,
        event: Event,
        wanted: &'static str,
        change: impl Fn(&mut Sandbox),
    ) -> Result<Sandbox, LifecycleError> {
        match self.apply(id, event, change).await {
            Ok((row, _)) => Ok(row),
            Err(LifecycleError::Rejected(_)) => {
                Err(LifecycleError::wrong_status(&self.get(id).await?, wanted))
            }
            Err(error) => Err(error),
        }
    }

    /// Writes the result of the host's work, repeatedly if the database fails. If all attempts
    /// fail, the reconciler writes it.
    async fn write(
        &self,
        id: &SandboxId,
        event: Event,
        change: impl Fn(&mut Sandbox),
    ) -> Result<Sandbox, LifecycleError> {
        let mut attempt = 1;
        loop {
            match self.apply(id, event, &change).await {
                Ok((row, _)) => return Ok(row),
                Err(error @ LifecycleError::Db(_)) if attempt < WRITE_ATTEMPTS => {
                    tracing::error!(sandbox_id = %id, error = %error.as_report(), ?event, "failed to write the result of the host's work");
                    attempt += 1;
                    tokio::time::sleep(WRITE_PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Handles a failed call or a lost reply: the host's current state determines the row's status.
    async fn after_failure(
        &self,
        id: &SandboxId,
        step: Step,
        error: AgentError,
    ) -> Result<Sandbox, LifecycleError> {
        tracing::warn!(sandbox_id = %id, ?step, %error, "agent call failed");
        let Ok(found) = self.agent.find(id.as_str()).await else {
            return Err(error.into());
        };
        let state = found.as_ref().map(|info| info.state.as_known());
        let info = found.unwrap_or_default();
        let now = clock::now_ms();
        match (state, step) {
            // A paused sandbox consists of files only, and these may become available again.
            (None, Step::Resume) => {
                let warning = "the host does not have the sandbox's files";
                self.write(id, Event::ResumeFailed, |row| {
                    warning.clone_into(&mut row.warning);
                })
                .await?;
            }
            (None, Step::Pause) => {
                self.lost(id, &format!("the host lost the sandbox: {}", told(&error)))
                    .await?
            }
            (Some(Some(SandboxState::SANDBOX_STATE_ERROR)), _) => {
                self.lost(id, &lost_reason(&info)).await?;
                self.destroy_at_host(id).await;
            }
            // The VM was lost, and the sandbox is paused at an earlier snapshot. That is not the
            // requested pause.
            (Some(Some(SandboxState::SANDBOX_STATE_PAUSED)), Step::Pause)
                if !info.warning.is_empty() =>
            {
                self.write(id, Event::PauseDone, |row| {
                    row.warning.clone_from(&info.warning);
                })
                .await?;
            }
            (Some(Some(SandboxState::SANDBOX_STATE_PAUSED)), Step::Pause) => {
                return self
                    .write(id, Event::PauseDone, |row| row.warning.clear())
                    .await;
            }
            (Some(Some(SandboxState::SANDBOX_STATE_RUNNING)), Step::Resume) => {
                return self
                    .write(id, Event::ResumeDone, |row| resumed_from_host(row, &info))
                    .await;
            }
            (Some(Some(SandboxState::SANDBOX_STATE_RUNNING)), Step::Pause) => {
                let warning = format!("the pause failed: {}", told(&error));
                self.write(id, Event::PauseFailed, |row| {
                    fill_from_host(row, &info, now);
                    row.warning.clone_from(&warning);
                })
                .await?;
            }
            (Some(Some(SandboxState::SANDBOX_STATE_PAUSED)), Step::Resume) => {
                let warning = format!("the resume failed: {}", told(&error));
                self.write(id, Event::ResumeFailed, |row| {
                    row.warning.clone_from(&warning);
                })
                .await?;
            }
            // The operation is still in progress. The reconciler sees its result.
            (Some(_), _) => {}
        }
        Err(error.into())
    }

    async fn lost(&self, id: &SandboxId, reason: &str) -> Result<(), LifecycleError> {
        self.write(id, Event::Lost, |row| reason.clone_into(&mut row.error))
            .await
            .map(drop)
    }
}

/// Returns the reason why the host reports the sandbox in state error.
pub(crate) fn lost_reason(info: &SandboxInfo) -> String {
    if info.reason.is_empty() {
        return "the VM is gone".to_owned();
    }
    info.reason.clone()
}

/// Entry in the table of shared resumes.
struct Entry<'a>(&'a Lifecycle, &'a SandboxId);

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.0.resumes().remove(self.1);
    }
}
