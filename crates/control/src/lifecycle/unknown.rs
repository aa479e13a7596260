//! Unknown sandboxes: sandboxes that exist on the host and have no row.
//!
//! Either the database is empty, restored from an older copy or not the intended one, or the
//! sandboxes belong to a second control plane. Their users still need them, so they are never
//! destroyed automatically. They are left unchanged and listed. Only a client's call adopts or
//! destroys them.
//!
//! | failed step of an adopt   | state left behind                  | next adopt                |
//! |---------------------------|------------------------------------|---------------------------|
//! | no such sandbox           | unchanged                          | 404 again                 |
//! | host rejects or is away   | unchanged                          | starts over               |
//! | row cannot be written     | owned by this installation, no row | starts over, same result  |
//! | this process dies         | as for the step before             | starts over               |

use std::collections::BTreeMap;

use wrenn_db::{Options, Sandbox};
use wrenn_model::{Egress, OnTimeout, SandboxId, SandboxStatus};
use wrenn_proto::rpc::hostagent::{
    v1 as rpc,
    v1::{SandboxInfo, SandboxState},
};

use super::{Lifecycle, LifecycleError, fill_from_host};
use crate::clock;

impl Lifecycle {
    /// Returns the host's sandboxes that have no row, by id.
    pub async fn unknown(&self) -> Result<Vec<SandboxInfo>, LifecycleError> {
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

    /// Adds a row for an unknown sandbox, and makes this installation its owner.
    pub async fn adopt(&self, id: &SandboxId) -> Result<Sandbox, LifecycleError> {
        let _lock = self.locks.lock(id).await;
        self.find_unknown(id).await?;
        let info = self.agent.adopt(id.as_str()).await?;
        let mut row = row_of(id, &info)?;
        row.host_id = self.host_of_new_rows();
        self.db.insert_sandbox(&row).await?;
        // The insert omits the columns that are set only once a sandbox runs.
        self.db.update_sandbox(&row).await?;
        tracing::info!(sandbox_id = %id, status = %row.status, "unknown sandbox adopted");
        self.get(id).await
    }

    /// Destroys an unknown sandbox.
    pub async fn destroy_unknown(&self, id: &SandboxId) -> Result<(), LifecycleError> {
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

/// Returns the row of an adopted sandbox. The metadata and options of its original row are not
/// known, so they get their defaults.
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
