//! Sandboxes that the host has and the database does not know.
//!
//! An empty, a restored or a mistyped database, or a second control plane's sandboxes: nothing of
//! that is lost, so nothing of that is destroyed. Such a sandbox keeps running and is listed. Only a
//! command adopts or destroys it.
//!
//! | adopt: failed step     | state left behind                    | next adopt                      |
//! |------------------------|--------------------------------------|---------------------------------|
//! | host has no such id    | unchanged                            | 404 again                       |
//! | host rejects, is away  | unchanged                            | starts over                     |
//! | row cannot be written  | owned by this installation, no row   | starts over, same result        |
//! | this process dies      | as for the step before               | starts over                     |

use std::collections::BTreeMap;

use wrenn_proto::{
    SandboxId,
    rest::{Egress, OnTimeout, SandboxStatus},
    rpc::hostagent::v1::{self as rpc, SandboxInfo, SandboxState},
};

use super::{Lifecycle, LifecycleError, fill_from_host};
use crate::{
    clock,
    db::{options::Options, sandboxes::Sandbox},
};

impl Lifecycle {
    /// Returns the host's sandboxes that have no row, by id.
    pub(crate) async fn unknown(&self) -> Result<Vec<SandboxInfo>, LifecycleError> {
        let mut unknown = Vec::new();
        for info in self.agent.list().await? {
            let Ok(id) = info.id.parse() else { continue };
            if self.db.sandbox(&id).await?.is_none() && !self.is_creating(&id) {
                unknown.push(info);
            }
        }
        unknown.sort_by(|one, other| one.id.cmp(&other.id));
        Ok(unknown)
    }

    /// Adds a row for a sandbox that only the host knows, and makes this installation its owner.
    pub(crate) async fn adopt(&self, id: &SandboxId) -> Result<Sandbox, LifecycleError> {
        let _lock = self.locks.lock(id).await;
        self.find_unknown(id).await?;
        let info = self.agent.adopt(id.as_str()).await?;
        let mut row = row_of(id, &info)?;
        row.host_id = self.host_of_new_rows();
        self.db.insert_sandbox(&row).await?;
        // An insert leaves out what only a running sandbox has.
        self.db.update_sandbox(&row).await?;
        tracing::info!(sandbox_id = %id, status = %row.status, "unknown sandbox adopted");
        self.get(id).await
    }

    /// Destroys a sandbox that only the host knows.
    pub(crate) async fn destroy_unknown(&self, id: &SandboxId) -> Result<(), LifecycleError> {
        let _lock = self.locks.lock(id).await;
        self.find_unknown(id).await?;
        self.agent.adopt(id.as_str()).await?;
        self.agent.destroy(id.as_str()).await?;
        tracing::info!(sandbox_id = %id, "unknown sandbox destroyed");
        Ok(())
    }

    async fn find_unknown(&self, id: &SandboxId) -> Result<(), LifecycleError> {
        if self.db.sandbox(id).await?.is_some() || self.is_creating(id) {
            return Err(LifecycleError::Known(id.clone()));
        }
        match self.agent.find(id.as_str()).await? {
            Some(_) => Ok(()),
            None => Err(LifecycleError::NotFound(id.clone())),
        }
    }
}

/// Returns the row of an adopted sandbox. Metadata and options of its first row are gone.
fn row_of(id: &SandboxId, info: &SandboxInfo) -> Result<Sandbox, LifecycleError> {
    let status = match info.state.as_known() {
        Some(SandboxState::SANDBOX_STATE_STARTING) => SandboxStatus::Starting,
        Some(SandboxState::SANDBOX_STATE_RUNNING) => SandboxStatus::Running,
        Some(SandboxState::SANDBOX_STATE_PAUSED) => SandboxStatus::Paused,
        _ => return Err(LifecycleError::Busy(id.clone())),
    };
    let now = clock::now_ms();
    let mut row = Sandbox {
        id: id.clone(),
        template: info.template.clone(),
        status,
        version: 0,
        vcpus: info.vcpus,
        memory_mb: info.memory_mb,
        disk_size_mb: info.disk_size_mb,
        timeout_sec: info.timeout_sec,
        on_timeout: OnTimeout::Pause,
        auto_resume: false,
        egress: match info.egress.as_known() {
            Some(rpc::Egress::EGRESS_ALLOW) => Egress::Allow,
            _ => Egress::Deny,
        },
        guest_ip: String::new(),
        host_ip: String::new(),
        metadata: BTreeMap::new(),
        error: String::new(),
        warning: String::new(),
        boot: None,
        created_at: info.created_unix_ms,
        started_at: 0,
        last_active_at: now,
        last_updated: now,
        expires_at: 0,
        envd_token: String::new(),
        options: Options::default(),
        idempotency_key: String::new(),
        host_id: String::new(),
    };
    fill_from_host(&mut row, info, now);
    Ok(row)
}
