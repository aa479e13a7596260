//! Snapshots and forks: a snapshot of a sandbox becomes a template, or further sandboxes.
//!
//! The source sandbox keeps running and keeps its status. Its lock is held during the operation,
//! and its row gets a new version at the end, so that the reconciler's observations of the host in
//! between are discarded.
//!
//! | failure                            | state left behind       | cleaned up by                |
//! |------------------------------------|-------------------------|------------------------------|
//! | the host rejects or fails the call | none                    | this module removes the rows |
//! |                                    |                         | of the copies                |
//! | reply of a fork is lost            | possibly copies without | this module, at the host;    |
//! |                                    | rows                    | reconciler, as orphans       |
//! | reply of a snapshot is lost        | possibly a template     | user, who sees it listed     |

use std::sync::Arc;

use futures::future::join_all;
use wrenn_db::{Options, Sandbox};
use wrenn_model::{SandboxId, SandboxStatus, TemplateName};
use wrenn_proto::rpc::hostagent::v1::{self as rpc, SandboxInfo, TemplateInfo};

use super::{ActivityGuard, Lifecycle, LifecycleError, creating::CreateEntry, network, told};
use crate::{
    agent_client::{AgentClient, AgentError},
    clock,
};

/// Maximum number of names to try if the host already has one.
const MAX_NAMES: usize = 8;

/// Form of the copies.
#[derive(Debug, Clone, Copy)]
pub enum CopyAs {
    /// Same form as the source.
    Source,
    /// Sandbox of the E2B API: has a deadline, and no idle timeout.
    Lifetime {
        /// Seconds until the deadline.
        lifetime_sec: u32,
    },
}

/// Row of a copy, with the entry of its create.
type NewCopy = (SandboxId, CreateEntry);

impl Lifecycle {
    /// Makes a template of a running or paused sandbox. Without a name, the template gets a random
    /// one. Completes even if the caller disconnects.
    pub async fn snapshot(
        self: &Arc<Self>,
        id: &SandboxId,
        name: Option<TemplateName>,
        overwrite: bool,
    ) -> Result<TemplateInfo, LifecycleError> {
        let (lifecycle, id) = (Arc::clone(self), id.clone());
        let task = self.spawn(async move {
            let lock = lifecycle.locks.lock(&id).await;
            lock.give_way(lifecycle.snapshot_locked(&id, name, overwrite))
                .await
        });
        task.await
            .unwrap_or_else(|_| Err(AgentError::task_ended("snapshot").into()))
    }

    async fn snapshot_locked(
        self: &Arc<Self>,
        id: &SandboxId,
        name: Option<TemplateName>,
        overwrite: bool,
    ) -> Result<TemplateInfo, LifecycleError> {
        let row = self.get(id).await?;
        if !matches!(row.status, SandboxStatus::Running | SandboxStatus::Paused) {
            return Err(LifecycleError::wrong_status(&row, "running` or `paused"));
        }
        let _used = ActivityGuard::new(Arc::clone(self), id.clone());
        let agent = &self.host_of(&row).await?.agent;
        let done = self.name_snapshot(agent, id, name, overwrite).await;
        let warning = match &done {
            Ok(_) => String::new(),
            // The request was invalid, so the sandbox's warning stays.
            Err(error) if is_refusal(error) => row.warning,
            Err(error) => format!("the snapshot failed: {}", told(error)),
        };
        self.note(id, |row| row.warning.clone_from(&warning)).await;
        Ok(done?)
    }

    async fn name_snapshot(
        &self,
        agent: &AgentClient,
        id: &SandboxId,
        name: Option<TemplateName>,
        overwrite: bool,
    ) -> Result<TemplateInfo, AgentError> {
        let mut attempt = 1;
        loop {
            let request = rpc::CreateSnapshotRequest {
                id: id.to_string(),
                name: name.clone().unwrap_or_else(TemplateName::random).into(),
                overwrite: overwrite && name.is_some(),
                ..Default::default()
            };
            match agent.create_snapshot(request).await {
                Err(error)
                    if error.is_already_exists() && name.is_none() && attempt < MAX_NAMES =>
                {
                    attempt += 1;
                }
                done => return done,
            }
        }
    }

    /// Makes copies of a running sandbox. Completes even if the caller disconnects.
    pub async fn fork(
        self: &Arc<Self>,
        id: &SandboxId,
        count: u32,
        copy_as: CopyAs,
    ) -> Result<Vec<Sandbox>, LifecycleError> {
        let (lifecycle, id) = (Arc::clone(self), id.clone());
        let task = self.spawn(async move {
            let lock = lifecycle.locks.lock(&id).await;
            lock.give_way(lifecycle.fork_locked(&id, count, copy_as))
                .await
        });
        task.await
            .unwrap_or_else(|_| Err(AgentError::task_ended("fork").into()))
    }

    async fn fork_locked(
        self: &Arc<Self>,
        id: &SandboxId,
        count: u32,
        copy_as: CopyAs,
    ) -> Result<Vec<Sandbox>, LifecycleError> {
        let source = self.get(id).await?;
        if source.status != SandboxStatus::Running {
            return Err(LifecycleError::wrong_status(&source, "running"));
        }
        let agent = &self.host_of(&source).await?.agent;
        let _used = ActivityGuard::new(Arc::clone(self), id.clone());
        let e2b_id = source.id.is_e2b() || matches!(copy_as, CopyAs::Lifetime { .. });
        let mut copies: Vec<NewCopy> = Vec::new();
        for _ in 0..count {
            match self
                .insert(e2b_id, agent, |copy| copy_row(copy, &source, copy_as))
                .await
            {
                Ok(copy) => copies.push(copy),
                Err(error) => {
                    self.remove_copies(copies).await;
                    return Err(error);
                }
            }
        }
        let request = rpc::ForkSandboxRequest {
            id: id.to_string(),
            copy_ids: copies.iter().map(|(copy, _)| copy.to_string()).collect(),
            ..Default::default()
        };
        let done = agent.fork(request).await;
        for (_, entry) in &copies {
            entry.call_ended();
        }
        let warning = match &done {
            Ok(_) => String::new(),
            Err(error) if is_refusal(error) => source.warning,
            Err(error) => format!("the fork failed: {}", told(error)),
        };
        self.note(id, |row| row.warning.clone_from(&warning)).await;
        match done {
            Ok(infos) => self.settle_copies(copies, &infos).await,
            Err(error) => {
                if error.is_unknown_outcome() {
                    join_all(copies.iter().map(|(copy, _)| self.destroy_at_host(copy))).await;
                }
                self.remove_copies(copies).await;
                Err(error.into())
            }
        }
    }

    /// Writes that the copies run. A copy that was destroyed in the meantime is destroyed at the
    /// host.
    async fn settle_copies(
        &self,
        copies: Vec<NewCopy>,
        infos: &[SandboxInfo],
    ) -> Result<Vec<Sandbox>, LifecycleError> {
        let mut rows = Vec::new();
        for (id, _entry) in copies {
            let info = infos.iter().find(|info| info.id == id.as_str());
            let _lock = self.locks.lock(&id).await;
            self.settle_create(&id, &Ok(info.cloned().unwrap_or_default()))
                .await;
            rows.push(self.get(&id).await?);
        }
        Ok(rows)
    }

    /// Removes the rows of copies that were never created. A row that has changed since, because
    /// its user destroyed the copy, stays.
    async fn remove_copies(&self, copies: Vec<NewCopy>) {
        for (id, entry) in copies {
            entry.call_ended();
            if let Err(error) = self.db.remove_sandbox(&id, 0).await {
                tracing::error!(sandbox_id = %id, %error, "failed to remove the row of a copy, the reconciler will settle it");
            }
            self.activity.forget(&id);
        }
    }
}

/// True if the host rejected the request and changed nothing.
fn is_refusal(error: &AgentError) -> bool {
    use connectrpc::ErrorCode as E;
    !error.connection_lost
        && matches!(
            error.code,
            E::AlreadyExists | E::InvalidArgument | E::NotFound | E::FailedPrecondition
        )
}

/// Returns the row of a copy before the host creates it.
fn copy_row(id: SandboxId, source: &Sandbox, copy_as: CopyAs) -> Sandbox {
    let now = clock::now_ms();
    let (timeout_sec, lifetime_sec) = match copy_as {
        CopyAs::Source => (source.timeout_sec, source.options.lifetime_sec),
        CopyAs::Lifetime { lifetime_sec } => (0, lifetime_sec),
    };
    let traffic_token = match source.options.traffic_token.is_empty() {
        true => String::new(),
        false => network::new_traffic_token(),
    };
    Sandbox {
        timeout_sec,
        options: Options {
            lifetime_sec,
            traffic_token,
            request_hash: String::new(),
            ..source.options.clone()
        },
        id,
        status: SandboxStatus::Starting,
        version: 0,
        guest_ip: String::new(),
        host_ip: String::new(),
        error: String::new(),
        warning: String::new(),
        boot: None,
        created_at: now,
        started_at: 0,
        last_active_at: 0,
        last_updated: now,
        expires_at: 0,
        envd_token: String::new(),
        idempotency_key: String::new(),
        host_id: String::new(),
        ..source.clone()
    }
}
