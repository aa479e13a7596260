//! What the control plane must be told.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use wrenn_proto::rest::Egress;

/// Settings of the control plane.
#[derive(Clone)]
pub struct ControlConfig {
    /// Where the REST API listens.
    pub listen: SocketAddr,
    /// Where requests to ports of sandboxes are taken.
    pub traffic_listen: SocketAddr,
    /// `sqlite://PATH?mode=rwc` or `postgres://...`.
    pub database_url: String,
    /// Where the host agent listens, `http://...`.
    pub agent_url: String,
    /// What the host agent asks of its callers.
    pub agent_token: String,
    /// Egress of a sandbox whose request does not say.
    pub default_egress: Egress,
    /// Where a first API key is written (mode 0600) if the database has none, or this file is missing.
    pub first_key_file: Option<PathBuf>,
    /// The same for a first key in the form that clients of the E2B API expect.
    pub first_e2b_key_file: Option<PathBuf>,
    /// How often rows and host are compared.
    pub poll_interval: Duration,
}

impl std::fmt::Debug for ControlConfig {
    /// Without secrets: the token, and the password that a database URL may hold.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlConfig")
            .field("listen", &self.listen)
            .field("traffic_listen", &self.traffic_listen)
            .field("agent_url", &self.agent_url)
            .field("default_egress", &self.default_egress)
            .field("first_key_file", &self.first_key_file)
            .field("first_e2b_key_file", &self.first_e2b_key_file)
            .field("poll_interval", &self.poll_interval)
            .finish_non_exhaustive()
    }
}
