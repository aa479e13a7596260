//! Byte streams to ports of sandboxes, through the agent of their host.
//!
//! `GET /tunnel/{id}/{port}` with `Upgrade: wrenn-tunnel` at the agent's RPC listener. The agent connects, answers `101`, and from
//! then on the connection is the port's. Anything else is an answer in JSON that says why not.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{body::Incoming, client::conn::http1, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;
use wrenn_proto::SandboxId;

use crate::DialError;

/// What the agent must answer within. It gives the port three seconds itself.
const DEADLINE: Duration = Duration::from_secs(5);

/// What an answer that is no stream may hold, bytes.
const MAX_ERROR_BYTES: usize = 4096;

const PROTOCOL: &str = "wrenn-tunnel";

/// The agent's address or token cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadAgent {
    /// Not `http://host:port`.
    #[error("`{0}` is not an address of an agent: expected http://host:port")]
    Url(String),
    /// Not something that a header can hold.
    #[error("the agent's token cannot be sent in a header")]
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

/// Why the agent did not open a stream.
#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

impl AgentTunnel {
    /// Streams through the agent at this URL, which knows this token. Connects when first used.
    ///
    /// # Errors
    /// If one of them cannot be used.
    pub fn new(agent_url: &str, token: &str) -> Result<Self, BadAgent> {
        let bad_url = || BadAgent::Url(agent_url.to_owned());
        let uri: Uri = agent_url.parse().map_err(|_| bad_url())?;
        let authority = uri.authority().ok_or_else(bad_url)?;
        if uri.scheme_str() != Some("http") {
            return Err(bad_url());
        }
        let mut bearer =
            HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| BadAgent::Token)?;
        bearer.set_sensitive(true);
        Ok(Self {
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            authority: HeaderValue::from_str(authority.as_str()).map_err(|_| bad_url())?,
            bearer,
        })
    }

    /// A stream to a port.
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
            .map_err(|error| DialError::Host(format!("it does not answer: {error}")))?;
        // What is sent through it is often small, and someone waits for it.
        let _ = stream.set_nodelay(true);
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broke)?;
        // Ends with the stream, or when `sender` is dropped.
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a tunnel broke");
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
    let refusal: Option<Refusal> = serde_json::from_slice(&body).ok();
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
