//! Creating sandboxes: a row, a task that owns the call to the host, and a guard for clients that
//! disconnect.

use std::{collections::HashMap, sync::Arc};

use thiserror_ext::AsReport as _;
use tokio::{sync::oneshot, task::JoinHandle};
use wrenn_db::{DbError, Options, Sandbox};
use wrenn_model::{Egress, MachineSize, OnTimeout, SandboxId, SandboxStatus, TeamId, TemplateName};
use wrenn_proto::rpc::hostagent::v1 as rpc;

use super::{
    Lifecycle, LifecycleError,
    creating::CreateEntry,
    idempotency::IdempotencyGuard,
    network::{network_policy, rpc_egress},
    report::HostReport,
    settle::Decision,
};
use crate::{
    agent_client::{AgentClient, AgentError},
    clock,
    state_machine::{Effect, Event},
};

/// Maximum number of names to try if one is taken.
const MAX_NAMES: usize = 8;

/// Parameters of a new sandbox, validated.
#[derive(Debug, Clone)]
pub struct NewSandbox {
    /// Team that owns it.
    pub team: TeamId,
    /// Template to create it from.
    pub template: TemplateName,
    /// Virtual CPUs, memory and disk.
    pub size: MachineSize,
    /// Idle time until `on_timeout` is applied, in seconds; 0 means never.
    pub timeout_sec: u32,
    /// Action at the end of the idle time or of the lifetime.
    pub on_timeout: OnTimeout,
    /// True if a call to the paused sandbox resumes it.
    pub auto_resume: bool,
    /// Network access to addresses beyond the host.
    pub egress: Egress,
    /// Environment of every process in the sandbox.
    pub envs: HashMap<String, String>,
    /// User-defined key-value pairs.
    pub metadata: std::collections::BTreeMap<String, String>,
    /// The sandbox's id has the form of the E2B API.
    pub e2b_id: bool,
    /// Rarely used options.
    pub options: Options,
    /// Idempotency key of the request; empty if it has none.
    pub idempotency_key: String,
}

/// Create in progress, as seen by its client. If it is dropped before [`keep`](Self::keep), the
/// sandbox is destroyed.
pub struct PendingCreate {
    lifecycle: Arc<Lifecycle>,
    /// Receives the id once the row exists.
    named: Option<oneshot::Receiver<Result<SandboxId, LifecycleError>>>,
    id: Option<SandboxId>,
    task: Option<JoinHandle<Result<(), AgentError>>>,
    /// Guard of the request, if the request has an idempotency key.
    ticket: Option<IdempotencyGuard>,
    kept: bool,
}

impl Lifecycle {
    /// Starts a create. A request with an idempotency key passes the ticket returned by
    /// [`earlier`](Self::earlier).
    pub fn create(
        self: &Arc<Self>,
        new: NewSandbox,
        ticket: Option<IdempotencyGuard>,
    ) -> PendingCreate {
        let (tell, named) = oneshot::channel();
        let lifecycle = Arc::clone(self);
        let task = self.spawn(async move {
            let agent = &lifecycle.fleet.placement().agent;
            let row = |id| new_row(id, &new);
            match lifecycle.insert(new.e2b_id, agent, row).await {
                Err(error) => {
                    let _ = tell.send(Err(error));
                    Ok(())
                }
                Ok((id, entry)) => {
                    // If the client is gone already, the guard's task still reads the id from the
                    // channel.
                    let _ = tell.send(Ok(id.clone()));
                    lifecycle.boot(&id, agent, new, entry).await
                }
            }
        });
        PendingCreate {
            lifecycle: Arc::clone(self),
            named: Some(named),
            id: None,
            task: Some(task),
            ticket,
            kept: false,
        }
    }

    /// Writes the row of a sandbox on an agent's host, under an unused id. The create is registered before the row becomes visible.
    pub(super) async fn insert(
        &self,
        e2b_id: bool,
        agent: &AgentClient,
        row: impl Fn(SandboxId) -> Sandbox,
    ) -> Result<(SandboxId, CreateEntry), LifecycleError> {
        for _ in 0..MAX_NAMES {
            let id = if e2b_id {
                SandboxId::random_e2b()
            } else {
                SandboxId::random()
            };
            let Some(entry) = self.creating.enter(&id) else {
                continue;
            };
            let mut row = row(id.clone());
            row.host_id = agent.row_host_id();
            match self.db.insert_sandbox(&row).await {
                Ok(()) => return Ok((id, entry)),
                Err(DbError::Exists) if self.has_request(&row).await? => {
                    return Err(LifecycleError::Busy(id));
                }
                Err(DbError::Exists) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(DbError::Exists.into())
    }

    /// Calls the host and writes the result to the row. The error is for the client, if it still
    /// waits.
    async fn boot(
        &self,
        id: &SandboxId,
        agent: &AgentClient,
        new: NewSandbox,
        entry: CreateEntry,
    ) -> Result<(), AgentError> {
        match self.apply(id, Event::CreateBegun, |_| ()).await {
            Ok((_, effects)) if effects.contains(&Effect::Create) => {}
            // The sandbox was destroyed before the create started.
            Ok(_) | Err(LifecycleError::Rejected(_)) => return Ok(()),
            Err(error) => {
                tracing::error!(sandbox_id = %id, %error, "failed to start the create");
                return Err(AgentError {
                    code: connectrpc::ErrorCode::Internal,
                    message: "failed to access the database".to_owned(),
                    connection_lost: false,
                    exit_code: None,
                });
            }
        }
        let result = agent.create(request(id, new)).await;
        entry.call_ended();
        // A destroy that is waiting for the end of the call goes first. The status is read again
        // after it.
        let _lock = self.locks.lock(id).await;
        self.settle_create(id, &result).await;
        result.map(drop)
    }

    /// Writes the result of the call to the row, and frees resources that must not remain.
    pub(super) async fn settle_create(
        &self,
        id: &SandboxId,
        result: &Result<rpc::SandboxInfo, AgentError>,
    ) {
        let decision = match result {
            Ok(info) => Decision::created(HostReport::from(info)),
            // A failed create is undone in any case, so no report of the host is needed.
            Err(error) => Decision::create_failed(reason(error)),
        };
        match self.settle(id, &decision).await {
            Ok(_) => {}
            Err(LifecycleError::Rejected(refused)) => {
                tracing::warn!(sandbox_id = %id, %refused, "create result arrived too late");
            }
            Err(error) => {
                tracing::error!(sandbox_id = %id, error = %error.as_report(), "failed to write the result of the create");
                // A sandbox without a row would be unusable. The reconciler settles the row when
                // the database is available again.
                self.destroy_at_host(id).await;
            }
        }
    }
}

impl PendingCreate {
    /// Returns the id of the sandbox, once its row exists.
    pub async fn id(&mut self) -> Result<SandboxId, LifecycleError> {
        if let Some(named) = self.named.as_mut() {
            let id = named.await.map_err(|_| ended())??;
            self.named = None;
            self.id = Some(id);
        }
        self.id.clone().ok_or_else(|| ended().into())
    }

    /// Waits for the end of the create. May be dropped and called again.
    pub async fn done(&mut self) -> Result<(), AgentError> {
        let Some(task) = self.task.as_mut() else {
            return Ok(());
        };
        let done = task.await;
        self.task = None;
        done.unwrap_or_else(|_| Err(ended()))
    }

    /// Ends the guard: the client received the sandbox and owns it now.
    pub fn keep(mut self) {
        self.kept = true;
    }

    /// Ends the guard of a failed create: the client received the failure, and the record stays.
    /// The same request may be made again.
    pub async fn failed(self) {
        if let (Some(id), Some(_)) = (&self.id, &self.ticket) {
            self.lifecycle.release_request(id).await;
        }
        self.keep();
    }
}

impl Drop for PendingCreate {
    fn drop(&mut self) {
        // Without a runtime this process is exiting. The next process's reconciler settles the row.
        if self.kept || tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        // Another handler may have returned the sandbox to the client.
        let ticket = self.ticket.take();
        if ticket.as_ref().is_some_and(|ticket| !ticket.give_up()) {
            return;
        }
        let (named, id) = (self.named.take(), self.id.take());
        let lifecycle = Arc::clone(&self.lifecycle);
        self.lifecycle.spawn(async move {
            let id = match (id, named) {
                (Some(id), _) => Some(id),
                (None, Some(named)) => named.await.ok().and_then(Result::ok),
                (None, None) => None,
            };
            let Some(id) = id else { return };
            tracing::info!(sandbox_id = %id, "client disconnected during the create");
            let why = "the client disconnected before it received the sandbox";
            if let Err(error) = lifecycle.destroy_now(&id, why).await {
                tracing::warn!(sandbox_id = %id, error = %error.as_report(), "failed to destroy an abandoned sandbox");
                lifecycle.destroy_at_host(&id).await;
            }
            if ticket.is_some() {
                lifecycle.release_request(&id).await;
            }
            // The same request may be made again only from here on.
            drop(ticket);
        });
    }
}

/// Describes the failure of a create for the row.
fn reason(error: &AgentError) -> String {
    if error.connection_lost {
        return "the connection to the host agent was lost during the create".to_owned();
    }
    match error.code {
        connectrpc::ErrorCode::Internal | connectrpc::ErrorCode::Unknown => {
            "the host failed to create the sandbox".to_owned()
        }
        _ => error.message.clone(),
    }
}

fn ended() -> AgentError {
    AgentError::task_ended("create")
}

fn new_row(id: SandboxId, new: &NewSandbox) -> Sandbox {
    let now = clock::now_ms();
    Sandbox {
        id,
        template: new.template.to_string(),
        status: SandboxStatus::Pending,
        version: 0,
        size: new.size,
        timeout_sec: new.timeout_sec,
        on_timeout: new.on_timeout,
        auto_resume: new.auto_resume,
        egress: new.egress,
        guest_ip: String::new(),
        host_ip: String::new(),
        metadata: new.metadata.clone(),
        error: String::new(),
        warning: String::new(),
        boot: None,
        created_at: now,
        started_at: 0,
        last_active_at: 0,
        last_updated: now,
        expires_at: 0,
        envd_token: String::new(),
        options: new.options.clone(),
        idempotency_key: new.idempotency_key.clone(),
        host_id: String::new(),
        team: new.team.clone(),
    }
}

fn request(id: &SandboxId, new: NewSandbox) -> rpc::CreateSandboxRequest {
    rpc::CreateSandboxRequest {
        id: id.to_string(),
        template: new.template.into(),
        vcpus: new.size.vcpus,
        memory_mb: new.size.memory_mib,
        timeout_sec: new.timeout_sec,
        egress: rpc_egress(new.egress).into(),
        envs: new.envs.into_iter().collect(),
        disk_size_mb: new.size.disk_mib,
        network: network_policy(&new.options.network).into(),
        ..Default::default()
    }
}
