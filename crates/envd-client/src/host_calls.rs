//! Calls that only the host makes: settings, health, metrics, and the calls around a snapshot.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use connectrpc::ConnectError;
use http::{Method, header};
use http_body_util::{BodyExt as _, Limited};
use serde::{Deserialize, Serialize};

use crate::{
    EnvdClient,
    client::{MAX_SMALL_ANSWER_BYTES, bad_request, full},
    deadline::{CALL_DEADLINE, HEALTH_DEADLINE, HOST_CALL_DEADLINE, PROBE_DEADLINE, within},
    guest_error,
};

/// Settings that the guest agent receives before its first use (`POST /init`).
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Init<'a> {
    /// Token that clients must present.
    pub access_token: &'a str,
    /// Environment of every process.
    pub env_vars: &'a BTreeMap<String, String>,
    /// User of calls that name no user; the guest agent's default if empty.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub default_user: &'a str,
    /// Time of these settings, in RFC 3339 format. The guest agent ignores settings that are older
    /// than its current ones.
    pub timestamp: String,
}

/// Snapshot that the guest prepares for (`POST /snapshot/prepare`).
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Prepare<'a> {
    /// ID of the snapshot.
    pub snapshot_id: &'a str,
    /// True if the snapshot keeps the page cache.
    pub keep_cache: bool,
    /// True if the guest keeps running after the snapshot, with all of its connections. Guest
    /// agents of earlier images close idle connections and forwarded ports all the same.
    pub keeps_running: bool,
}

/// Identity of the guest after a snapshot or a restore (`POST /snapshot/recover`). Omitted fields
/// stay unchanged.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Recover<'a> {
    /// Random bytes for the guest's random number generator, base64.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub entropy: String,
    /// ID of the sandbox.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub sandbox_id: &'a str,
    /// ID of the sandbox's template.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub template_id: &'a str,
    /// Host name of the guest.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub hostname: &'a str,
    /// Content of `/etc/machine-id`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub machine_id: String,
    /// Environment of every process from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<&'a BTreeMap<String, String>>,
    /// Token that clients must present from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token: Option<&'a str>,
    /// User of calls that name no user.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub default_user: &'a str,
    /// Nameservers of the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nameservers: Option<&'a [Ipv4Addr]>,
    /// MTU of the guest's link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

impl Recover<'_> {
    /// Keeps the guest's identity and supplies fresh entropy, because other VMs may run from the
    /// same snapshot.
    #[must_use]
    pub fn same() -> Self {
        Self {
            entropy: entropy(),
            ..Self::default()
        }
    }
}

/// Returns fresh random bytes for a guest, base64.
#[must_use]
pub fn entropy() -> String {
    BASE64_STANDARD.encode(rand::random::<[u8; 64]>())
}

/// Resource usage as reported by the guest.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// Unix timestamp, in seconds.
    pub ts: i64,
    /// Number of CPUs.
    pub cpu_count: u32,
    /// CPU usage, in percent.
    pub cpu_used_pct: f64,
    /// Total memory, in bytes.
    pub mem_total: u64,
    /// Used memory, in bytes.
    pub mem_used: u64,
    /// Memory of the page cache, in bytes.
    pub mem_cache: u64,
    /// Used disk space, in bytes.
    pub disk_used: u64,
    /// Size of the disk, in bytes.
    pub disk_total: u64,
}

impl EnvdClient {
    /// True if the guest agent reports that it is healthy. Cheap enough to be polled while a guest
    /// boots.
    pub async fn is_healthy(&self) -> bool {
        let probe = tokio::time::timeout(PROBE_DEADLINE, self.dial());
        if !matches!(probe.await, Ok(Ok(_))) {
            return false;
        }
        let answer = self.get("/health", HEALTH_DEADLINE).await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// True if the guest agent answers a health check within `deadline`, on whatever connection.
    pub async fn answers(&self, deadline: Duration) -> bool {
        self.get("/health", deadline).await.is_ok()
    }

    /// Sends the guest agent its settings.
    ///
    /// # Errors
    /// As listed in the crate's documentation, like every call below.
    pub async fn init(&self, init: &Init<'_>) -> Result<(), ConnectError> {
        self.post("/init", init, HOST_CALL_DEADLINE).await
    }

    /// Prepares the guest for a snapshot.
    ///
    /// # Errors
    /// If the guest rejects the call or does not answer.
    pub async fn prepare(&self, prepare: &Prepare<'_>) -> Result<(), ConnectError> {
        self.post("/snapshot/prepare", prepare, HOST_CALL_DEADLINE)
            .await
    }

    /// Ends the state that [`prepare`](Self::prepare) began: after a snapshot, after a restore, or
    /// if neither takes place.
    ///
    /// # Errors
    /// If the guest rejects the call or does not answer.
    pub async fn recover(&self, recover: &Recover<'_>) -> Result<(), ConnectError> {
        self.post("/snapshot/recover", recover, HOST_CALL_DEADLINE)
            .await
    }

    async fn post(
        &self,
        path: &str,
        body: &impl Serialize,
        deadline: Duration,
    ) -> Result<(), ConnectError> {
        let body = serde_json::to_vec(body).map_err(|_| {
            ConnectError::internal("failed to encode the request to the guest agent")
        })?;
        let request = self
            .request(Method::POST, path)
            .header(header::CONTENT_TYPE, "application/json")
            .body(full(body))
            .map_err(bad_request)?;
        let answer = self.send(request, deadline).await?;
        guest_error::check(answer, "").await.map(drop)
    }

    /// Returns the guest's resource usage.
    ///
    /// # Errors
    /// If the guest rejects the call or does not answer.
    pub async fn metrics(&self) -> Result<Metrics, ConnectError> {
        let answer = self.get("/metrics", CALL_DEADLINE).await?;
        let answer = guest_error::check(answer, "").await?;
        let body = Limited::new(answer.into_body(), MAX_SMALL_ANSWER_BYTES);
        let body = within(CALL_DEADLINE, async { Ok(body.collect().await) }).await?;
        let body = body.map_err(|e| {
            ConnectError::unavailable(format!("failed to read the guest's metrics: {e}"))
        })?;
        serde_json::from_slice(&body.to_bytes()).map_err(|e| {
            ConnectError::internal(format!("failed to parse the guest's metrics: {e}"))
        })
    }

    async fn get(
        &self,
        path: &str,
        deadline: Duration,
    ) -> Result<http::Response<hyper::body::Incoming>, ConnectError> {
        let request = self.request(Method::GET, path);
        let request = request.body(full(Bytes::new())).map_err(bad_request)?;
        self.send(request, deadline).await
    }
}
