//! Configuration of the control plane.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use wrenn_model::Egress;

/// Limits that an operator can change. `docs/limits.md` describes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of concurrent connections per listener.
    pub max_clients: usize,
    /// Maximum number of concurrent connections per listener and peer.
    pub max_clients_per_peer: usize,
    /// Maximum size of all bodies of requests and responses that are held in memory as a whole, in
    /// bytes.
    pub max_buffered_bytes: usize,
    /// Time that the row of a sandbox is kept after its end; `None`: for ever.
    pub retention: Option<Duration>,
    /// Maximum lifetime that a client of the E2B API can request, in seconds.
    pub max_lifetime_sec: u32,
    /// Maximum time that a request waits for an earlier one with the same idempotency key.
    pub idempotency_wait: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_clients: 8192,
            max_clients_per_peer: 1024,
            max_buffered_bytes: 256 * 1024 * 1024,
            retention: Some(Duration::from_secs(30 * 24 * 3600)),
            max_lifetime_sec: 30 * 24 * 3600,
            idempotency_wait: Duration::from_secs(50),
        }
    }
}

/// Settings of the control plane.
#[derive(Clone)]
pub struct ControlConfig {
    /// Address of the REST API.
    pub listen: SocketAddr,
    /// Address for requests to ports of sandboxes.
    pub traffic_listen: SocketAddr,
    /// URL of the database: `sqlite://PATH?mode=rwc` or `postgres://...`.
    pub database_url: String,
    /// URL of the host agent, `http://...`.
    pub agent_url: String,
    /// Token that the host agent requires from its callers.
    pub agent_token: String,
    /// Egress of a sandbox whose request does not specify it.
    pub default_egress: Egress,
    /// File to which a first API key is written (mode 0600) if the database has none, or if this
    /// file is missing.
    pub first_key_file: Option<PathBuf>,
    /// Same as `first_key_file`, for a first key in the form that clients of the E2B API expect.
    pub first_e2b_key_file: Option<PathBuf>,
    /// Interval at which the reconciler compares rows and host.
    pub poll_interval: Duration,
    /// Limits.
    pub limits: Limits,
}

impl std::fmt::Debug for ControlConfig {
    /// Omits the secrets: the token, and the database URL, which may contain a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlConfig")
            .field("listen", &self.listen)
            .field("traffic_listen", &self.traffic_listen)
            .field("agent_url", &self.agent_url)
            .field("default_egress", &self.default_egress)
            .field("first_key_file", &self.first_key_file)
            .field("first_e2b_key_file", &self.first_e2b_key_file)
            .field("poll_interval", &self.poll_interval)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}
