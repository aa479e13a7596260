//! Operations on the sandboxes of this host, for all callers: the RPC service, and the maker of
//! template snapshots.
//!
//! Speaks the types of this crate only, and does not know any protocol. The operations on one
//! sandbox (destroy, pause, resume, snapshot) are methods of its handle, [`Sandbox`]. A sandbox's
//! actor completes what it has begun, even if the caller disconnects.

mod fork;
mod named_snapshots;

use std::sync::Arc;

use tokio::sync::oneshot;
use wrenn_model::MachineSize;

pub(crate) use fork::ForkError;
pub(crate) use named_snapshots::{DeleteSnapshotError, NamedSnapshotError, RemoteSnapshotError};

use super::{
    CreateError, Plan, Sandbox, SandboxFacts, Start, UseError, actor::SandboxActors,
    resources::HostContext, spawn,
};
use crate::{
    admission::{self, AdmissionError, CreateRequest},
    memory_ledger::MemoryReservation,
};

/// Sandboxes of this host.
#[derive(Clone)]
pub(crate) struct SandboxService {
    actors: SandboxActors,
}

/// Create that was started.
pub(crate) struct PendingCreate {
    sandbox: Arc<Sandbox>,
    outcome: oneshot::Receiver<Result<(), CreateError>>,
}

impl PendingCreate {
    /// Waits until the sandbox runs, or until its create failed and was undone.
    pub(crate) async fn wait(self) -> Result<Arc<Sandbox>, CreateError> {
        self.outcome
            .await
            .unwrap_or(Err(CreateError::Panicked))
            .map(|()| self.sandbox)
    }
}

impl SandboxService {
    /// Returns the service of the sandboxes that these actors own.
    pub(crate) const fn new(actors: SandboxActors) -> Self {
        Self { actors }
    }

    /// Returns the environment of the sandboxes.
    pub(crate) fn host(&self) -> &Arc<HostContext> {
        &self.actors.host
    }

    /// Returns the sandbox with an ID taken from a request.
    pub(crate) fn find(&self, id: &str) -> Result<Arc<Sandbox>, UseError> {
        self.actors.registry.get(id)
    }

    /// Returns all sandboxes, sorted by ID.
    pub(crate) fn list(&self) -> Vec<Arc<Sandbox>> {
        self.actors.registry.list()
    }

    /// Rejects new sandboxes once the agent is shutting down.
    pub(crate) fn require_open(&self) -> Result<(), CreateError> {
        if self.actors.shutdown.is_cancelled() {
            return Err(CreateError::ShuttingDown);
        }
        Ok(())
    }

    /// Creates a sandbox, if the request is admitted. Returns when the sandbox runs.
    pub(crate) async fn create(&self, request: CreateRequest) -> Result<Arc<Sandbox>, CreateError> {
        let host = self.actors.host.clone();
        let planned = tokio::task::spawn_blocking(move || admission::plan(&host, request)).await;
        let plan = planned.map_err(|_| CreateError::Panicked)??;
        let memory = self.reserve(plan.size)?;
        self.start(plan, memory)?.wait().await
    }

    /// Reserves the memory of a new sandbox.
    pub(crate) fn reserve(&self, size: MachineSize) -> Result<MemoryReservation, AdmissionError> {
        self.actors.host.memory.reserve(size.memory_mib)
    }

    /// Starts the actor of a new sandbox, which creates it in the reserved memory.
    pub(crate) fn start(
        &self,
        plan: Plan,
        memory: MemoryReservation,
    ) -> Result<PendingCreate, CreateError> {
        let (sandbox, mailbox) = Sandbox::new(
            SandboxFacts::from(&plan),
            plan.access.clone(),
            plan.installation.clone(),
            plan.created_unix_ms,
        );
        if !self.actors.registry.insert(sandbox.clone()) {
            return Err(CreateError::Exists(plan.id));
        }
        let (made, outcome) = oneshot::channel();
        let plan = Box::new(plan);
        spawn(
            &self.actors,
            sandbox.clone(),
            mailbox,
            Start::Create { plan, memory, made },
        );
        Ok(PendingCreate { sandbox, outcome })
    }
}
