//! Changes of a sandbox's access rules during its life.
//!
//! | # | step                                      | failure               | sandbox afterwards |
//! |---|-------------------------------------------|-----------------------|--------------------|
//! | 1 | `spec.json` with the new lists, by rename | disk full             | unchanged          |
//! | 2 | rules of host and namespace, if it runs   | kernel or nft error   | previous access    |
//!
//! If the agent is killed after either step, the next agent finds the new lists and applies the
//! rules for them.
//!
//! A paused sandbox has no rules. They are made from the lists when it is resumed. A guest receives
//! its nameservers when it boots or is resumed. A running guest keeps its nameservers until then.

use super::{State, actor::SandboxActor, error::LifecycleError};
use crate::{
    network::egress::Access,
    sandbox_dir::{SandboxDir, SandboxDirError},
};
use thiserror_ext::AsReport as _;
use wrenn_sys::failpoint;

impl SandboxActor {
    /// Changes the addresses that the sandbox may reach. Takes effect at once if the sandbox runs,
    /// otherwise when it is resumed. On failure, the access is unchanged.
    pub(super) async fn set_access(&mut self, access: Access) -> Result<(), LifecycleError> {
        let sandbox_dir = self
            .resources
            .sandbox_dir
            .clone()
            .ok_or(LifecycleError::Gone)?;
        let network = self.actors.host.network.clone();
        let before = self.sandbox.access();
        note(&sandbox_dir, &access).await?;
        failpoint::hit("agent.network.noted", None);
        let runs = matches!(self.sandbox.state(), State::Running(_));
        if let Some(slot) = self.resources.slot.filter(|_| runs)
            && let Err(error) = network.update(slot, &access).await
        {
            tracing::warn!(
                error = error.to_report_string(),
                "failed to change the network access"
            );
            // Only the first failure is reported. If the roll-back fails too, the next change or
            // the next agent sets all rules.
            let _ = note(&sandbox_dir, &before).await;
            let _ = network.update(slot, &before).await;
            return Err(LifecycleError::Access(error));
        }
        failpoint::hit("agent.network.applied", None);
        self.sandbox.note_access(access);
        if runs {
            self.sandbox.set_warning(self.obstacle().await);
        }
        Ok(())
    }
}

/// Writes the lists to `spec.json`, on a blocking thread because flushing to disk blocks.
async fn note(sandbox_dir: &SandboxDir, access: &Access) -> Result<(), LifecycleError> {
    let (sandbox_dir, access) = (sandbox_dir.clone(), access.clone());
    let noted = tokio::task::spawn_blocking(move || {
        let mut spec = sandbox_dir.read_spec()?;
        (spec.network.allow, spec.network.deny) = access.lists();
        spec.network.egress = access.egress;
        sandbox_dir.write_spec(&spec)
    });
    let noted: Result<(), SandboxDirError> = noted.await.map_err(|_| LifecycleError::Gone)?;
    Ok(noted?)
}
