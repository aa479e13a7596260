//! Destroying: under the sandbox's lock, until the host has nothing of it.

use std::{sync::Arc, time::Duration};

use wrenn_proto::SandboxId;

use super::{Lifecycle, LifecycleError, creating::Phase};
use crate::{
    agent_client::AgentError,
    state_machine::{Effect, Event},
};

/// How long a destroy that met a create waits before it asks the host again.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// What a destroy may take in all; the reconciler goes on after that.
const LIMIT: Duration = Duration::from_secs(60);

impl Lifecycle {
    /// Destroys a sandbox; its row becomes `stopped`. Done already is success. `why` is kept in the row: empty if its
    /// user asked for it. Goes on if the caller goes away.
    pub(crate) async fn destroy(
        self: &Arc<Self>,
        id: &SandboxId,
        why: &'static str,
    ) -> Result<(), LifecycleError> {
        let (lifecycle, id) = (Arc::clone(self), id.clone());
        let task = self.spawn(async move { lifecycle.destroy_now(&id, why).await });
        task.await
            .unwrap_or_else(|_| Err(AgentError::task_ended("destroy").into()))
    }

    /// As [`destroy`](Self::destroy), for tasks that nobody drops.
    pub(super) async fn destroy_now(
        &self,
        id: &SandboxId,
        why: &str,
    ) -> Result<(), LifecycleError> {
        let _lock = self.locks.lock(id).await;
        self.destroy_locked(id, why).await
    }

    /// Destroys, for one who holds the lock.
    pub(crate) async fn destroy_locked(
        &self,
        id: &SandboxId,
        why: &str,
    ) -> Result<(), LifecycleError> {
        let (_, effects) = self
            .apply(id, Event::DestroyAsked, |row| {
                if !why.is_empty() {
                    why.clone_into(&mut row.error);
                }
            })
            .await?;
        if !effects.contains(&Effect::Destroy) {
            return Ok(());
        }
        self.free_at_host(id).await?;
        self.apply(id, Event::Destroyed, |_| ()).await?;
        self.uses.forget(id);
        self.reaping.forget(id);
        Ok(())
    }

    /// Asks the host until nothing of it can be there: while a create's call is under way, it may still come up after
    /// the host has said that it knows nothing of it.
    async fn free_at_host(&self, id: &SandboxId) -> Result<(), AgentError> {
        let freed = async {
            loop {
                let create = self.creating.watch(id);
                let calling = create
                    .as_ref()
                    .is_some_and(|phase| *phase.borrow() == Phase::Calling);
                self.agent.destroy(id.as_str()).await?;
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
                        "the host did not destroy it within {} s; it will be tried again",
                        LIMIT.as_secs()
                    ),
                    connection_lost: false,
                })
            })
    }
}
