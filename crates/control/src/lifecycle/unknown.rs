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

use wrenn_db::{Options, Owner, Sandbox};
use wrenn_model::{Egress, MachineSize, OnTimeout, SandboxId, SandboxStatus, TeamId};
use wrenn_proto::rpc::hostagent::v1::{self as rpc, SandboxInfo};

use super::{
    Lifecycle, LifecycleError,
    report::{HostReport, HostState},
    settle::{Cause, settle},
};
use crate::{agent_client::AgentClient, clock, state_machine::transition};

impl Lifecycle {
    /// Returns the hosts' sandboxes that have no row, by id.
    pub async fn unknown(&self) -> Result<Vec<SandboxInfo>, LifecycleError> {
        let mut unknown = Vec::new();
        for host in self.fleet.hosts() {
            for info in host.agent.list().await? {
                let Ok(id) = info.id.parse() else { continue };
                if self.db.sandbox(Owner::Any, &id).await?.is_none() && !self.is_creating(&id) {
                    unknown.push(info);
                }
            }
        }
        unknown.sort_by(|one, other| one.id.cmp(&other.id));
        Ok(unknown)
    }

    /// Adds a row for an unknown sandbox, which then belongs to the team, and makes this installation
    /// responsible for it.
    pub async fn adopt(&self, team: &TeamId, id: &SandboxId) -> Result<Sandbox, LifecycleError> {
        let _lock = self.locks.lock(id).await;
        let agent = self.find_unknown(id).await?;
        let info = agent.adopt(id.as_str()).await?;
        let mut row = row_of(id, &info)?;
        row.host_id = agent.row_host_id();
        row.team = team.clone();
        self.db.insert_sandbox(&row).await?;
        // The insert omits the columns that are set only once a sandbox runs.
        self.db.update_sandbox(&row).await?;
        tracing::info!(sandbox_id = %id, status = %row.status, "unknown sandbox adopted");
        self.get(id).await
    }

    /// Destroys an unknown sandbox.
    pub async fn destroy_unknown(&self, id: &SandboxId) -> Result<(), LifecycleError> {
        let _lock = self.locks.lock(id).await;
        let agent = self.find_unknown(id).await?;
        agent.adopt(id.as_str()).await?;
        agent.destroy(id.as_str()).await?;
        tracing::info!(sandbox_id = %id, "unknown sandbox destroyed");
        Ok(())
    }

    /// Returns the agent of the host that has an unknown sandbox.
    async fn find_unknown(&self, id: &SandboxId) -> Result<&AgentClient, LifecycleError> {
        if self.db.sandbox(Owner::Any, id).await?.is_some() || self.is_creating(id) {
            return Err(LifecycleError::Known(id.clone()));
        }
        for host in self.fleet.hosts() {
            if host.agent.find(id.as_str()).await?.is_some() {
                return Ok(&host.agent);
            }
        }
        Err(LifecycleError::NotFound(id.clone()))
    }
}

/// Returns the row of an adopted sandbox. The metadata and options of its original row are not
/// known, so they get their defaults.
fn row_of(id: &SandboxId, info: &SandboxInfo) -> Result<Sandbox, LifecycleError> {
    let report = HostReport::from(info);
    // Any other state is about to change, or to end.
    if !matches!(
        report.state,
        HostState::Starting | HostState::Running | HostState::Paused
    ) {
        return Err(LifecycleError::Busy(id.clone()));
    }
    let now = clock::now_ms();
    let mut row = Sandbox {
        id: id.clone(),
        template: info.template.clone(),
        status: SandboxStatus::Starting,
        version: 0,
        size: MachineSize {
            vcpus: info.vcpus,
            memory_mib: info.memory_mb,
            disk_mib: info.disk_size_mb,
        },
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
        team: TeamId::default(),
    };
    report.fill(&mut row, now);
    if let Some(decision) = settle(row.status, Some(&report), Cause::Pass) {
        (row.status, _) = transition(row.status, decision.event)?;
        decision.change.write_to(&mut row, now);
    }
    Ok(row)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::*;

    #[test]
    fn an_adopted_row_has_the_status_of_the_host_and_its_data() {
        let id: SandboxId = "sb-1".parse().unwrap();
        for (state, wanted) in [
            (rpc::SandboxState::SANDBOX_STATE_STARTING, Some("starting")),
            (rpc::SandboxState::SANDBOX_STATE_RUNNING, Some("running")),
            (rpc::SandboxState::SANDBOX_STATE_PAUSED, Some("paused")),
            (rpc::SandboxState::SANDBOX_STATE_PAUSING, None),
            (rpc::SandboxState::SANDBOX_STATE_RESUMING, None),
            (rpc::SandboxState::SANDBOX_STATE_STOPPING, None),
            (rpc::SandboxState::SANDBOX_STATE_ERROR, None),
            (rpc::SandboxState::SANDBOX_STATE_UNSPECIFIED, None),
        ] {
            let info = SandboxInfo {
                state: state.into(),
                host_ip: "10.0.0.1".to_owned(),
                warning: "restored".to_owned(),
                ..Default::default()
            };
            match (row_of(&id, &info), wanted) {
                (Ok(row), Some(wanted)) => {
                    assert_eq!(row.status.to_string(), wanted);
                    assert_eq!((row.host_ip, row.warning), (info.host_ip, info.warning));
                    assert!(row.started_at > 0 && row.expires_at == 0);
                }
                (Err(LifecycleError::Busy(_)), None) => {}
                (got, _) => panic!("{state:?} {got:?}"),
            }
        }
    }
}
