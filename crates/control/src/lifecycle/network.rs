//! Changes of a sandbox's access rules during its life: first at the host, then in the row.

use std::sync::Arc;

use rand::RngExt as _;
use wrenn_db::NetworkLists;
use wrenn_model::{Egress, SandboxId, SandboxStatus};
use wrenn_proto::rpc::hostagent::v1 as rpc;

use super::{Lifecycle, LifecycleError};
use crate::agent_client::AgentError;

impl Lifecycle {
    /// Replaces the access rules of a running or paused sandbox. `asked` is the client's value of
    /// `egress`. Completes even if the caller disconnects.
    pub async fn set_network(
        self: &Arc<Self>,
        id: &SandboxId,
        egress: Egress,
        asked: Option<bool>,
        lists: NetworkLists,
    ) -> Result<(), LifecycleError> {
        let (lifecycle, id) = (Arc::clone(self), id.clone());
        let task = self.spawn(async move {
            let _lock = lifecycle.locks.lock(&id).await;
            let row = lifecycle.get(&id).await?;
            if !matches!(row.status, SandboxStatus::Running | SandboxStatus::Paused) {
                return Err(LifecycleError::wrong_status(&row, "running` or `paused"));
            }
            let request = rpc::UpdateNetworkRequest {
                id: id.to_string(),
                egress: rpc_egress(egress).into(),
                network: network_policy(&lists).into(),
                ..Default::default()
            };
            let host = lifecycle.host_of(&row).await?;
            host.agent.update_network(request).await?;
            let written = lifecycle.change(&id, |row| {
                row.egress = egress;
                row.options.internet = asked;
                row.options.network.clone_from(&lists);
            });
            written.await.map(drop)
        });
        task.await
            .unwrap_or_else(|_| Err(AgentError::task_ended("network change").into()))
    }
}

/// Converts the policy to the host agent's type.
pub(super) const fn rpc_egress(egress: Egress) -> rpc::Egress {
    match egress {
        Egress::Allow => rpc::Egress::EGRESS_ALLOW,
        Egress::Deny => rpc::Egress::EGRESS_DENY,
    }
}

/// Converts the lists to the host agent's type.
pub(super) fn network_policy(lists: &NetworkLists) -> rpc::NetworkPolicy {
    rpc::NetworkPolicy {
        allow: lists.allow.clone(),
        deny: lists.deny.clone(),
        ..Default::default()
    }
}

/// Returns a token of 160 random bits, for the clients of a sandbox's ports.
pub fn new_traffic_token() -> String {
    hex::encode(rand::rng().random::<[u8; 20]>())
}
