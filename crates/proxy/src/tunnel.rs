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
use serde::Deserialize;
use tokio::net::TcpStream;
use wrenn_model::SandboxId;

use crate::DialError;

/// Time within which the agent must answer. The agent itself gives the port three seconds.
const DEADLINE: Duration = Duration::from_secs(5);

/// Maximum size of an error response, in bytes.
const MAX_ERROR_BYTES: usize = 4096;

const PROTOCOL: &str = "wrenn-tunnel";

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

/// Opens streams through one agent.
#[derive(Debug, Clone)]
pub struct AgentTunnel {
    authority: HeaderValue,
    host: String,
    port: u16,
    bearer: HeaderValue,
}

/// Error response of the agent.
#[derive(Deserialize)]
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

    /// Opens a stream to a port.
    ///
    /// # Errors
    /// See [`DialError`].
    pub async fn dial(&self, id: &SandboxId, port: u16) -> Result<TokioIo<Upgraded>, DialError> {
        tokio::time::timeout(DEADLINE, self.open(id, port))
            .await
            .map_err(|_| DialError::TimedOut(DEADLINE))?
    }

    async fn open(&self, id: &SandboxId, port: u16) -> Result<TokioIo<Upgraded>, DialError> {
        let stream = TcpStream::connect((self.host.as_str(), self.port))
            .await
            .map_err(|error| DialError::Host(format!("the agent is unreachable: {error}")))?;
        // Data in the tunnel often comes in small pieces that a peer is waiting for.
        let _ = stream.set_nodelay(true);
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
            .header(header::UPGRADE, PROTOCOL)
            .body(Empty::<Bytes>::new())
            .map_err(|error| DialError::Host(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(broke)?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(response).await);
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(broke)?;
        Ok(TokioIo::new(upgraded))
    }
}

fn broke(error: hyper::Error) -> DialError {
    DialError::Host(error.to_string())
}

async fn refusal(response: Response<Incoming>) -> DialError {
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ERROR_BYTES)
        .collect()
        .await;
    let body = body
        .map(http_body_util::Collected::to_bytes)
        .unwrap_or_default();
    let refusal: Option<RejectionBody> = serde_json::from_slice(&body).ok();
    let is_port_closed = refusal
        .as_ref()
        .is_some_and(|refusal| refusal.code == "port_closed");
    match status {
        StatusCode::BAD_GATEWAY if is_port_closed => DialError::PortClosed,
        StatusCode::NOT_FOUND | StatusCode::CONFLICT if refusal.is_some() => DialError::NotRunning,
        StatusCode::TOO_MANY_REQUESTS => DialError::TooMany,
        _ => {
            let why = refusal.map(|refusal| refusal.message).unwrap_or_default();
            DialError::Host(format!("{status}: {why}"))
        }
    }
}
