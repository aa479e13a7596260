//! Forks: copies of a running sandbox, which keeps running.

use std::{collections::BTreeMap, sync::Arc};

use wrenn_model::SandboxId;

use super::{
    super::{CreateError, LifecycleError, Sandbox},
    SandboxService,
};
use crate::{
    admission::{AdmissionError, CreateParams},
    host::HostCapacity,
    memory_ledger::MemoryReservation,
    snapshots::LocatedSnapshot,
};

/// Failure to fork a sandbox. No copy exists.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ForkError {
    /// The snapshot of the sandbox was not taken.
    #[error(transparent)]
    Snapshot(#[from] LifecycleError),
    /// A copy was not created.
    #[error(transparent)]
    Copy(#[from] CreateError),
}

impl SandboxService {
    /// Creates copies of a sandbox from a new snapshot of it: all of them, or none.
    pub(crate) async fn fork(
        &self,
        sandbox: &Sandbox,
        copy_ids: Vec<SandboxId>,
    ) -> Result<Vec<Arc<Sandbox>>, ForkError> {
        let disk_space = &self.actors.host.disk_space;
        disk_space.check_create().map_err(CreateError::from)?;
        // All copies, or none: reserved before the sandbox is paused for its snapshot.
        let size = sandbox.facts.size;
        let memory: Result<Vec<_>, _> = copy_ids.iter().map(|_| self.reserve(size)).collect();
        let memory = memory.map_err(CreateError::from)?;
        let pin = sandbox.snapshot().await?;
        let host = self.actors.host.clone();
        let located = tokio::task::spawn_blocking(move || {
            let capacity =
                HostCapacity::read(&host.config.data_dir).map_err(AdmissionError::Capacity)?;
            Ok::<_, CreateError>((capacity, host.snapshots.locate(&pin)?))
        });
        let (capacity, snapshot) = located.await.map_err(|_| CreateError::Panicked)??;
        let copies = copy_ids.into_iter().zip(memory).collect();
        Ok(self.copy(sandbox, &capacity, &snapshot, copies).await?)
    }

    async fn copy(
        &self,
        sandbox: &Sandbox,
        capacity: &HostCapacity,
        snapshot: &LocatedSnapshot,
        copies: Vec<(SandboxId, MemoryReservation)>,
    ) -> Result<Vec<Arc<Sandbox>>, CreateError> {
        let mut pending = Vec::new();
        let mut last_error = None;
        for (id, memory) in copies {
            let params = CreateParams {
                id,
                template_name: sandbox.facts.template.clone(),
                timeout_sec: sandbox.facts.timeout_sec,
                access: sandbox.access(),
                envs: BTreeMap::new(),
                installation: sandbox.installation(),
            };
            let plan = params.with_snapshot(capacity, snapshot.clone());
            let started = plan.map_err(Into::into);
            match started.and_then(|plan| self.start(plan, memory)) {
                Ok(copy) => pending.push(copy),
                Err(error) => {
                    last_error = Some(error);
                    break;
                }
            }
        }
        let mut copies = Vec::new();
        for copy in pending {
            match copy.wait().await {
                Ok(copy) => copies.push(copy),
                Err(error) => last_error = Some(error),
            }
        }
        let Some(error) = last_error else {
            return Ok(copies);
        };
        for copy in copies {
            // A copy that cannot be freed stays listed, in state error.
            let _ = copy.destroy().await;
        }
        Err(error)
    }
}
