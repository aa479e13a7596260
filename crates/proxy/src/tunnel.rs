//! Byte streams to ports of sandboxes, tunneled through the agent of their host.
//!
//! The request is `GET /tunnel/{id}/{port}` with `Upgrade: wrenn-tunnel` at the agent's RPC
//! listener. The agent connects to the port and answers `101`; from then on the connection carries
//! the port's bytes. Any other response is a JSON error with the reason.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{body::Incoming, client::conn::http1, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use rustix::net::sockopt;
use serde::Deserialize;
use tokio::net::TcpStream;
use wrenn_model::SandboxId;
use wrenn_proto::headers;

use crate::DialError;

/// Time within which the agent must answer. The agent itself gives the port five seconds.
const DEADLINE: Duration = Duration::from_secs(8);

/// Idle time before keepalive probes. Interval and number of probes are the kernel's (75 s, 9).
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);

/// Maximum size of an error response, in bytes.
const MAX_ERROR_BYTES: usize = 4096;

/// Invalid address or token of the agent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidAgentUrl {
    /// Not of the form `http://host:port`.
    #[error("invalid agent URL `{0}`: expected http://host:port")]
    Url(String),
    /// The token contains characters that a header cannot hold.
    #[error("the agent token contains characters that an HTTP header cannot hold")]
    Token,
}

/// Reasons for which an agent opened no tunnel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TunnelError {
    /// The agent rejected the request. Code and message are empty if the response is not one of a
    /// tunnel.
    #[error("{status}: {message}")]
    Rejected {
        /// Status of the response.
        status: StatusCode,
        /// Code of the error: `not_found`, `failed_precondition`, `port_closed`, …
        code: String,
        /// Message of the agent.
        message: String,
    },
    /// The agent cannot be reached, or its connection broke; carries the reason.
    #[error("{0}")]
    Unreachable(String),
    /// The agent did not answer in time.
    #[error("timed out after {0:?}")]
    TimedOut(Duration),
}

impl TunnelError {
    /// True if the agent reports that the port has no listener.
    #[must_use]
    pub fn is_port_closed(&self) -> bool {
        matches!(self, Self::Rejected { status, code, .. }
            if *status == StatusCode::BAD_GATEWAY && code == "port_closed")
    }

    /// True if the agent reports that it does not have the sandbox.
    #[must_use]
    pub fn is_unknown_sandbox(&self) -> bool {
        matches!(self, Self::Rejected { status, code, .. }
            if *status == StatusCode::NOT_FOUND && !code.is_empty())
    }

    /// Returns the agent's description of a sandbox that is not running.
    #[must_use]
    pub fn not_running(&self) -> Option<&str> {
        match self {
            Self::Rejected {
                status,
                code,
                message,
            } if *status == StatusCode::CONFLICT && !code.is_empty() => Some(message),
            _ => None,
        }
    }

    /// True if the sandbox has too many tunnels.
    #[must_use]
    pub fn is_too_many(&self) -> bool {
        matches!(self, Self::Rejected { status, .. } if *status == StatusCode::TOO_MANY_REQUESTS)
    }
}

impl From<TunnelError> for DialError {
    fn from(error: TunnelError) -> Self {
        if error.is_port_closed() {
            return Self::PortClosed;
        }
        if error.is_unknown_sandbox() || error.not_running().is_some() {
            return Self::NotRunning;
        }
        if error.is_too_many() {
            return Self::TooMany;
        }
        match error {
            TunnelError::TimedOut(after) => Self::TimedOut(after),
            other => Self::Host(other.to_string()),
        }
    }
}

/// Opens streams through one agent.
#[derive(Debug, Clone)]
pub struct AgentTunnel {
    authority: HeaderValue,
    host: String,
    port: u16,
    bearer: HeaderValue,
}

/// Error response of the agent.
#[derive(Default, Deserialize)]
struct RejectionBody {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

impl AgentTunnel {
    /// Creates a tunnel through the agent at `agent_url`, authenticated with `token`. Connects on
    /// first use.
    ///
    /// # Errors
    /// If the URL or the token is invalid.
    pub fn new(agent_url: &str, token: &str) -> Result<Self, InvalidAgentUrl> {
        let bad_url = || InvalidAgentUrl::Url(agent_url.to_owned());
        let uri: Uri = agent_url.parse().map_err(|_| bad_url())?;
        let authority = uri.authority().ok_or_else(bad_url)?;
        if uri.scheme_str() != Some("http") {
            return Err(bad_url());
        }
        let mut bearer = HeaderValue::from_str(&format!("Bearer {token}"))
            .map_err(|_| InvalidAgentUrl::Token)?;
        bearer.set_sensitive(true);
        Ok(Self {
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            authority: HeaderValue::from_str(authority.as_str()).map_err(|_| bad_url())?,
            bearer,
        })
    }

    /// Opens a stream to a port, for the proxy.
    ///
    /// # Errors
    /// See [`DialError`].
    pub async fn dial(&self, id: &SandboxId, port: u16) -> Result<TokioIo<Upgraded>, DialError> {
        Ok(self.open(id, port).await?)
    }

    /// Opens a stream to a port.
    ///
    /// # Errors
    /// See [`TunnelError`].
    pub async fn open(&self, id: &SandboxId, port: u16) -> Result<TokioIo<Upgraded>, TunnelError> {
        tokio::time::timeout(DEADLINE, self.ask(id, port))
            .await
            .map_err(|_| TunnelError::TimedOut(DEADLINE))?
    }

    async fn ask(&self, id: &SandboxId, port: u16) -> Result<TokioIo<Upgraded>, TunnelError> {
        let stream = TcpStream::connect((self.host.as_str(), self.port))
            .await
            .map_err(|error| {
                TunnelError::Unreachable(format!("the agent is unreachable: {error}"))
            })?;
        tune(&stream);
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broke)?;
        // Ends with the stream, or when `sender` is dropped.
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "tunnel failed");
            }
        });
        let request = Request::builder()
            .method(Method::GET)
            .uri(format!("/tunnel/{id}/{port}"))
            .header(header::HOST, &self.authority)
            .header(header::AUTHORIZATION, &self.bearer)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, headers::TUNNEL_PROTOCOL)
            .body(Empty::<Bytes>::new())
            .map_err(|error| TunnelError::Unreachable(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(broke)?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(rejection(response).await);
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(broke)?;
        Ok(TokioIo::new(upgraded))
    }
}

/// Sets the options of the connection. Best effort. Data in the tunnel often comes in small pieces
/// that a peer is waiting for, and an agent whose host has disappeared must be noticed.
fn tune(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(stream, true);
    let _ = sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE);
}

fn broke(error: hyper::Error) -> TunnelError {
    TunnelError::Unreachable(error.to_string())
}

async fn rejection(response: Response<Incoming>) -> TunnelError {
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ERROR_BYTES)
        .collect()
        .await;
    let body = body
        .map(http_body_util::Collected::to_bytes)
        .unwrap_or_default();
    let body: RejectionBody = serde_json::from_slice(&body).unwrap_or_default();
    TunnelError::Rejected {
        status,
        code: body.code,
        message: body.message,
    }
}
