//! Pause and resume: under the sandbox's lock, in a separate task, marked in the row before the
//! host is called. A destroy does not wait for either of them ([`super::locks`]): it aborts them at
//! the host.
//!
//! The host's report decides. If a call fails or its reply is lost, the host is asked for the
//! current state of the sandbox. If the host does not answer that either, the row stays `pausing`
//! or `resuming`, and the reconciler settles it.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::Shared};
use wrenn_db::{ResumeAs, Sandbox};
use wrenn_model::{SandboxId, SandboxStatus};
use wrenn_proto::rpc::hostagent::v1::PauseEffort;

use super::{
    Lifecycle, LifecycleError,
    report::HostReport,
    settle::{Cause, Decision, settle},
    told,
};
use crate::{agent_client::AgentError, state_machine::Event};

/// Resume that callers share: one call to the host, one result for all.
pub(super) type SharedResume =
    Shared<futures::future::BoxFuture<'static, Result<(), Arc<LifecycleError>>>>;

/// Minimum lifetime after a resume that was started by a call, in seconds. A sandbox with a
/// lifetime of a few seconds must not end in the middle of the call that woke it.
const MIN_WOKEN_SEC: u32 = 300;

/// Maximum time for calls to the guest in progress to complete before a pause.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

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
            let lock = lifecycle.locks.lock(&id).await;
            let effort = PauseEffort::PAUSE_EFFORT_UNSPECIFIED;
            lock.give_way(lifecycle.pause_locked(&id, disk_only, effort))
                .await
        });
        task.await
            .unwrap_or_else(|_| Err(AgentError::task_ended("pause").into()))
    }

    /// Like [`pause`](Self::pause). The caller holds the lock.
    pub(super) async fn pause_locked(
        &self,
        id: &SandboxId,
        disk_only: bool,
        effort: PauseEffort,
    ) -> Result<Sandbox, LifecycleError> {
        let row = self.begin_pause(id, disk_only).await?;
        self.pause_begun(&row, effort).await
    }

    /// Pauses a sandbox whose row is already marked `pausing`. Calls to its guest in progress may
    /// complete first; the agent cuts off those that take longer.
    pub(super) async fn pause_begun(
        &self,
        row: &Sandbox,
        effort: PauseEffort,
    ) -> Result<Sandbox, LifecycleError> {
        let id = &row.id;
        self.guests.drain(id, DRAIN_LIMIT).await;
        let host = self.host_of(row).await?;
        match host.agent.pause(id.as_str(), effort).await {
            Ok(info) => self.settle(id, &Decision::paused(info.warning)).await,
            Err(error) => self.after_failure(row, error).await,
        }
    }

    /// Resumes a paused sandbox. With `disk_only`, it boots from its disk. Completes even if the
    /// caller disconnects.
    pub async fn resume(
        self: &Arc<Self>,
        id: &SandboxId,
        disk_only: bool,
    ) -> Result<Sandbox, LifecycleError> {
        let (lifecycle, id) = (Arc::clone(self), id.clone());
        let how = ResumeAs {
            disk_only,
            ..ResumeAs::default()
        };
        let task = self.spawn(async move {
            let lock = lifecycle.locks.lock(&id).await;
            lock.give_way(lifecycle.resume_locked(&id, how)).await
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
        let host = self.host_of(&row).await?;
        match host.agent.resume(id.as_str(), disk_only).await {
            Ok(info) => {
                let report = HostReport::from(&info);
                self.settle(id, &Decision::resumed(report)).await
            }
            Err(error) => self.after_failure(&row, error).await,
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
        let lock = self.locks.lock(id).await;
        lock.give_way(self.resume_if_paused_locked(id)).await
    }

    async fn resume_if_paused_locked(&self, id: &SandboxId) -> Result<(), LifecycleError> {
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
        self.settle(id, &Decision::pause_withdrawn())
            .await
            .map(drop)
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

    /// Handles a failed call or a lost reply: the host's current state determines the row's status.
    /// `row` has the status that was written before the call. Succeeds if the call achieved its
    /// purpose nevertheless.
    async fn after_failure(
        &self,
        row: &Sandbox,
        error: AgentError,
    ) -> Result<Sandbox, LifecycleError> {
        let (id, marked) = (&row.id, row.status);
        tracing::warn!(sandbox_id = %id, status = %marked, %error, "agent call failed");
        let Ok(report) = self.report(row).await else {
            return Err(error.into());
        };
        let cause = Cause::CallFailed {
            error: &told(&error),
        };
        // Without a decision, the operation is still in progress. The reconciler sees its result.
        let Some(decision) = settle(marked, report.as_ref(), cause) else {
            return Err(error.into());
        };
        let row = self.settle(id, &decision).await?;
        let warned = report.is_some_and(|report| !report.warning.is_empty());
        match decision.event {
            Event::ResumeDone => Ok(row),
            // With a warning, the VM was lost, and the sandbox is paused at an earlier snapshot.
            // That is not the requested pause.
            Event::PauseDone if !warned => Ok(row),
            _ => Err(error.into()),
        }
    }
}

/// Entry in the table of shared resumes.
struct Entry<'a>(&'a Lifecycle, &'a SandboxId);

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.0.resumes().remove(self.1);
    }
}
