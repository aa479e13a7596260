//! Hosts of this control plane, addressed by their ids.
//!
//! Owns the connections to the hosts' agents. Each row of a sandbox names its host, and every call
//! about the sandbox goes to this host. A host's id is learned from its agent, so it is unknown
//! until the agent's first answer. [`Fleet::host`] asks for it then: an agent of another host would
//! answer that it has no such sandbox, and the row would be taken for that of a lost sandbox.
//!
//! The settings name one host. Nothing outside this module relies on that.
//!
//! | row's host | agent's host      | result                         |
//! |------------|-------------------|--------------------------------|
//! | any        | does not answer   | error of the call, 503         |
//! | A          | A                 | the call goes to this agent    |
//! | A          | B                 | [`FleetError::OtherHost`], 503 |
//! | unknown    | any, only one     | the call goes to this agent    |
//! | unknown    | one of several    | [`FleetError::OtherHost`], 503 |
//! | any        | none, only one    | the call goes to this agent    |

use std::sync::Arc;

use connectrpc::ErrorCode;
use wrenn_db::UNKNOWN_HOST;
use wrenn_proxy::AgentTunnel;

use crate::agent_client::{AgentClient, AgentError};

/// Connections to one host.
#[derive(Clone)]
pub struct HostLink {
    /// Client of the host's agent.
    pub agent: AgentClient,
    /// Byte streams to the ports of the host's sandboxes.
    pub tunnel: AgentTunnel,
}

/// Hosts of this control plane.
#[derive(Clone)]
pub struct Fleet {
    first: HostLink,
    others: Arc<[HostLink]>,
}

/// Reason why no agent can be called for a sandbox.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FleetError {
    /// The sandbox is on a host that this control plane is not connected to.
    #[error("the sandbox is on host {host}, and this control plane is connected to host {here}")]
    OtherHost {
        /// Host that has the sandbox.
        host: String,
        /// Hosts that this control plane is connected to.
        here: String,
    },
    /// The agent did not tell the id of its host.
    #[error("the host agent call failed")]
    Agent(#[from] AgentError),
}

impl From<FleetError> for AgentError {
    fn from(error: FleetError) -> Self {
        match error {
            FleetError::Agent(error) => error,
            FleetError::OtherHost { .. } => Self {
                code: ErrorCode::Unavailable,
                message: error.to_string(),
                connection_lost: false,
                exit_code: None,
            },
        }
    }
}

impl Fleet {
    /// Returns a fleet of at least one host.
    pub fn new(first: HostLink, others: impl IntoIterator<Item = HostLink>) -> Self {
        Self {
            first,
            others: others.into_iter().collect(),
        }
    }

    /// Returns all hosts.
    pub fn hosts(&self) -> impl Iterator<Item = &HostLink> {
        std::iter::once(&self.first).chain(self.others.iter())
    }

    /// Returns the host on which new sandboxes are placed, and whose templates are offered.
    pub const fn placement(&self) -> &HostLink {
        &self.first
    }

    /// Returns the host that a row names.
    ///
    /// # Errors
    /// [`FleetError`] if this control plane is not connected to it, or cannot know because an agent
    /// does not answer.
    pub async fn host(&self, host_id: &str) -> Result<&HostLink, FleetError> {
        let mut unavailable = None;
        for link in self.hosts() {
            match link.agent.learn_host_id().await {
                Ok(()) if self.serves(link, host_id) => return Ok(link),
                Ok(()) => {}
                Err(error) => unavailable = Some(error),
            }
        }
        Err(unavailable.map_or_else(|| self.other_host(host_id), FleetError::Agent))
    }

    /// Returns the host that a row names, if it is connected. Does not call any agent: while the
    /// only agent has not reported its host's id, it counts as the host.
    pub fn connected(&self, host_id: &str) -> Option<&HostLink> {
        self.hosts().find(|link| self.serves(link, host_id))
    }

    /// True if a row of `host_id` is a matter of this host.
    pub fn serves(&self, link: &HostLink, host_id: &str) -> bool {
        let here = link.agent.host_id();
        if self.others.is_empty() && (here.is_empty() || host_id == UNKNOWN_HOST) {
            return true;
        }
        here == host_id
    }

    /// Returns the error for a row whose host is not connected.
    pub(crate) fn other_host(&self, host_id: &str) -> FleetError {
        let here: Vec<_> = self.hosts().map(|link| link.agent.host_id()).collect();
        FleetError::OtherHost {
            host: host_id.to_owned(),
            here: here.join(", "),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::*;

    /// Returns the connections to a host whose agent has reported this id. Nothing listens there.
    fn link(reported: Option<&str>) -> HostLink {
        let url = "http://127.0.0.1:1";
        let agent = AgentClient::new(url, "token", "installation").unwrap();
        if let Some(id) = reported {
            agent.note_host_id(id);
        }
        let tunnel = AgentTunnel::new(url, "token").unwrap();
        HostLink { agent, tunnel }
    }

    #[tokio::test]
    async fn a_row_is_a_matter_of_the_host_that_it_names() {
        let fleet = Fleet::new(link(Some("a")), [link(Some("b"))]);
        for id in ["a", "b"] {
            assert_eq!(fleet.host(id).await.unwrap().agent.host_id(), id);
        }
        for id in ["c", "", UNKNOWN_HOST] {
            let error = fleet.host(id).await.err().unwrap();
            assert!(matches!(error, FleetError::OtherHost { here, .. } if here == "a, b"));
            assert!(fleet.connected(id).is_none(), "{id}");
        }
        assert_eq!(fleet.placement().agent.host_id(), "a");
    }

    #[tokio::test]
    async fn a_row_without_a_host_belongs_to_the_only_one() {
        let fleet = Fleet::new(link(Some("a")), []);
        for (id, is_here) in [("a", true), (UNKNOWN_HOST, true), ("b", false)] {
            assert_eq!(fleet.host(id).await.is_ok(), is_here, "{id}");
            assert_eq!(fleet.connected(id).is_some(), is_here, "{id}");
        }
        // An agent of release 0.1.0 reports no id.
        let fleet = Fleet::new(link(Some("")), []);
        assert!(fleet.host("b").await.is_ok());
        assert_eq!(fleet.placement().agent.row_host_id(), UNKNOWN_HOST);
    }

    #[tokio::test]
    async fn no_call_is_made_to_a_host_that_has_not_reported_its_id() {
        let fleet = Fleet::new(link(None), []);
        for id in ["a", UNKNOWN_HOST] {
            let error = fleet.host(id).await.err().unwrap();
            assert!(matches!(error, FleetError::Agent(error) if error.connection_lost));
            assert!(fleet.connected(id).is_some());
        }
    }
}
