//! Destroying sandboxes: under the sandbox's lock, until the host has no resources of it. A pause,
//! a resume or a copy in progress gives way ([`super::locks`]), and the agent aborts it.

use std::{sync::Arc, time::Duration};

use wrenn_model::SandboxId;

use super::{Lifecycle, LifecycleError, creating::Phase};
use crate::{
    agent_client::{AgentClient, AgentError},
    state_machine::{Effect, Event},
};

/// Interval between requests to the host while a create is in progress.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// Maximum total time of a destroy. After that, the reconciler continues.
const LIMIT: Duration = Duration::from_secs(60);

impl Lifecycle {
    /// Destroys a sandbox; its row becomes `stopped`. Succeeds if that was already done. `why` is
    /// stored in the row, and empty if the user requested the destroy. Completes even if the caller
    /// disconnects.
    pub async fn destroy(
        self: &Arc<Self>,
        id: &SandboxId,
        why: &'static str,
    ) -> Result<(), LifecycleError> {
        let (lifecycle, id) = (Arc::clone(self), id.clone());
        let task = self.spawn(async move { lifecycle.destroy_now(&id, why).await });
        task.await
            .unwrap_or_else(|_| Err(AgentError::task_ended("destroy").into()))
    }

    /// Like [`destroy`](Self::destroy), for tasks that are never dropped.
    pub(super) async fn destroy_now(
        &self,
        id: &SandboxId,
        why: &str,
    ) -> Result<(), LifecycleError> {
        let _lock = self.locks.lock_to_destroy(id).await;
        self.destroy_locked(id, why).await
    }

    /// Destroys a sandbox. The caller holds the lock.
    pub async fn destroy_locked(&self, id: &SandboxId, why: &str) -> Result<(), LifecycleError> {
        let (row, effects) = self
            .apply(id, Event::DestroyAsked, |row| {
                if !why.is_empty() {
                    why.clone_into(&mut row.error);
                }
            })
            .await?;
        if !effects.contains(&Effect::Destroy) {
            return Ok(());
        }
        let host = self.host_of(&row).await?;
        self.free_at_host(id, &host.agent).await?;
        self.apply(id, Event::Destroyed, |_| ()).await?;
        self.activity.forget(id);
        self.idle.forget(id);
        Ok(())
    }

    /// Requests the destroy at the host until no resource can remain. While the call of a create is
    /// in progress, the sandbox may still appear after the host reported that it does not know it.
    async fn free_at_host(&self, id: &SandboxId, agent: &AgentClient) -> Result<(), AgentError> {
        let freed = async {
            loop {
                let create = self.creating.watch(id);
                let calling = create
                    .as_ref()
                    .is_some_and(|phase| *phase.borrow() == Phase::Calling);
                agent.destroy(id.as_str()).await?;
                let Some(mut create) = create.filter(|_| calling) else {
                    return Ok(());
                };
                let ended = create.wait_for(|phase| *phase > Phase::Calling);
                let _ = tokio::time::timeout(ASK_AGAIN, ended).await;
            }
        };
        tokio::time::timeout(LIMIT, freed)
            .await
            .unwrap_or_else(|_| {
                Err(AgentError {
                    code: connectrpc::ErrorCode::DeadlineExceeded,
                    message: format!(
                        "the host did not destroy the sandbox within {} s; the destroy will be retried",
                        LIMIT.as_secs()
                    ),
                    connection_lost: false,
                    exit_code: None,
                })
            })
    }
}
