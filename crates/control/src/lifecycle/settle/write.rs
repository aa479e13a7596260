//! Application of decisions: to the row, and then at the host.

use thiserror_ext::AsReport as _;
use wrenn_db::Sandbox;
use wrenn_model::SandboxId;

use super::{Decision, Destroy};
use crate::{
    clock,
    lifecycle::{Lifecycle, LifecycleError, WRITE_ATTEMPTS, WRITE_PAUSE, report::HostReport},
    state_machine::Effect,
};

impl Lifecycle {
    /// Returns the host's current report on a sandbox; `None` if the host does not have it.
    pub(in crate::lifecycle) async fn report(
        &self,
        row: &Sandbox,
    ) -> Result<Option<HostReport>, LifecycleError> {
        let host = self.host_of(row).await?;
        let found = host.agent.find(row.id.as_str()).await?;
        Ok(found.as_ref().map(HostReport::from))
    }

    /// Applies a decision. The caller holds the sandbox's lock.
    ///
    /// # Errors
    /// If the row could not be written, or the host failed to destroy a sandbox that must be
    /// destroyed first. A failure of a later destroy is only logged.
    pub(crate) async fn settle(
        &self,
        id: &SandboxId,
        decision: &Decision,
    ) -> Result<Sandbox, LifecycleError> {
        if decision.destroy == Destroy::First {
            let host = self.find_host(id).await?;
            host.agent.destroy(id.as_str()).await?;
        }
        let (row, effects) = self.write(id, decision).await?;
        if decision.destroy == Destroy::IfRequired && effects.contains(&Effect::Destroy) {
            self.destroy_at_host(id).await;
        }
        Ok(row)
    }

    /// Writes a decision to the row, repeatedly if the database fails. If all attempts fail, the
    /// reconciler makes the decision again.
    async fn write(
        &self,
        id: &SandboxId,
        decision: &Decision,
    ) -> Result<(Sandbox, Vec<Effect>), LifecycleError> {
        let event = decision.event;
        let mut attempt = 1;
        loop {
            let written = self
                .apply(id, event, |row| {
                    decision.change.write_to(row, clock::now_ms());
                })
                .await;
            match written {
                Err(error @ LifecycleError::Db(_)) if attempt < WRITE_ATTEMPTS => {
                    tracing::error!(sandbox_id = %id, error = %error.as_report(), ?event, "failed to write the result of the host's work");
                    attempt += 1;
                    tokio::time::sleep(WRITE_PAUSE).await;
                }
                written => return written,
            }
        }
    }
}
