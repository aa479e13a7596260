//! Client of the host agent.
//!
//! Owns three pools of HTTP/1.1 connections, one per kind of call. A connection carries one call at
//! a time, so a long create cannot delay a destroy or a poll of the reconciler. Every call has a
//! deadline. Never retries, because a failed call may have been executed. Calls to the guests of
//! sandboxes do not pass through this client: see `guest`.

use std::{sync::Arc, time::Duration};

use connectrpc::{
    ConnectError, ErrorCode,
    client::{CallOptions, ClientConfig, HttpClient},
};
use parking_lot::Mutex;
use wrenn_db::UNKNOWN_HOST;
use wrenn_model::SandboxId;
use wrenn_proto::{
    headers,
    rpc::hostagent::v1::{self as rpc, HostAgentServiceClient},
};

use crate::error::ControlError;

/// Deadline of a query of the host's state. Below the 5 s in which a create must answer.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);

/// Deadline of a small call about one sandbox.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum size of an answer, in bytes. The list of all sandboxes is the largest.
const MAX_MESSAGE_BYTES: usize = 64 * 1024 * 1024;

type Client = HostAgentServiceClient<HttpClient>;

/// Failure of a call to the agent, or to a guest agent through it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{code:?}: {message}")]
pub struct AgentError {
    /// Code reported by the agent, or the code that describes how the call was lost.
    pub code: ErrorCode,
    /// Message of the agent.
    pub message: String,
    /// True if the connection failed. The error is then not an answer of the agent.
    pub connection_lost: bool,
    /// Exit code that a shell reports for a command that was not started, if its program is the
    /// reason.
    pub exit_code: Option<i32>,
}

impl AgentError {
    /// True if the agent reported that the object of the call does not exist.
    pub fn is_not_found(&self) -> bool {
        self.code == ErrorCode::NotFound && !self.connection_lost
    }

    /// True if the agent reported that the object to be created already exists.
    pub fn is_already_exists(&self) -> bool {
        self.code == ErrorCode::AlreadyExists && !self.connection_lost
    }

    /// True if the outcome is unknown: the reply is lost, or did not arrive in time.
    pub fn is_unknown_outcome(&self) -> bool {
        self.connection_lost || self.code == ErrorCode::DeadlineExceeded
    }

    /// Returns the error for a task of this process that ended without a result, because it
    /// panicked or the process is shutting down.
    pub fn task_ended(what: &str) -> Self {
        Self {
            code: ErrorCode::Internal,
            message: format!("the {what} task ended without a result"),
            connection_lost: false,
            exit_code: None,
        }
    }
}

impl From<ConnectError> for AgentError {
    fn from(error: ConnectError) -> Self {
        Self {
            code: error.code,
            // Only the transport attaches a source; an error that the agent sent has none.
            connection_lost: std::error::Error::source(&error).is_some(),
            exit_code: wrenn_envd_client::exit_code(&error),
            message: error.message.unwrap_or_default(),
        }
    }
}

/// Client of the host's agent.
#[derive(Clone)]
pub struct AgentClient {
    lifecycle: Client,
    looks: Client,
    calls: Client,
    /// Id of the agent's host, as last reported; `None` before the first answer.
    host_id: Arc<Mutex<Option<String>>>,
}

/// Makes a unary call with a deadline. Returns its answer as an owned value.
macro_rules! unary {
    ($client:expr, $method:ident, $request:expr, $limit:expr) => {{
        let options = CallOptions::default().with_timeout($limit);
        $client
            .$method($request, options)
            .await
            .map(|response| response.into_owned())
            .map_err(AgentError::from)
    }};
}

mod lifecycle;

pub use lifecycle::FREEZE_TIMEOUT;

impl AgentClient {
    /// Returns a client of one agent. Connections are opened when they are first used.
    /// `installation` is the id of this control plane's database.
    pub fn new(url: &str, token: &str, installation: &str) -> Result<Self, ControlError> {
        let bad_url = || ControlError::AgentUrl {
            url: url.to_owned(),
        };
        let uri: http::Uri = url.parse().map_err(|_| bad_url())?;
        if uri.scheme_str() != Some("http") || uri.authority().is_none() {
            return Err(bad_url());
        }
        let mut bearer = http::HeaderValue::from_str(&format!("Bearer {token}"))
            .map_err(|_| ControlError::AgentToken)?;
        bearer.set_sensitive(true);
        let config = ClientConfig::new(uri)
            .with_default_max_message_size(MAX_MESSAGE_BYTES)
            .with_default_header(http::header::AUTHORIZATION, bearer)
            .with_default_header(headers::INSTALLATION, installation);
        let client = || Client::new(HttpClient::plaintext(), config.clone());
        Ok(Self {
            lifecycle: client(),
            looks: client(),
            calls: client(),
            host_id: Arc::default(),
        })
    }

    /// Returns the id of the agent's host, as last reported; empty before the first answer, and if
    /// the agent reports none, as in release 0.1.0.
    pub fn host_id(&self) -> String {
        self.host_id.lock().clone().unwrap_or_default()
    }

    /// Returns the id of the agent's host, as rows name it.
    pub fn row_host_id(&self) -> String {
        match self.host_id() {
            id if id.is_empty() => UNKNOWN_HOST.to_owned(),
            id => id,
        }
    }

    /// Asks the agent for the id of its host, unless it has answered before.
    pub async fn learn_host_id(&self) -> Result<(), AgentError> {
        if self.host_id.lock().is_some() {
            return Ok(());
        }
        self.host().await.map(drop)
    }

    pub(crate) fn note_host_id(&self, reported: &str) {
        let mut id = self.host_id.lock();
        if id.as_deref() != Some(reported) {
            tracing::info!(host_id = reported, "connected to host");
            *id = Some(reported.to_owned());
        }
    }

    /// Returns the capacity and the templates of the host.
    pub async fn host(&self) -> Result<rpc::GetHostResponse, AgentError> {
        let request = rpc::GetHostRequest::default();
        let host = unary!(self.looks, get_host_with_options, request, LOOK_TIMEOUT)?;
        self.note_host_id(&host.host_id);
        Ok(host)
    }

    /// Returns all sandboxes of the host.
    pub async fn list(&self) -> Result<Vec<rpc::SandboxInfo>, AgentError> {
        let request = rpc::ListSandboxesRequest::default();
        let list = unary!(
            self.looks,
            list_sandboxes_with_options,
            request,
            LOOK_TIMEOUT
        )?;
        self.note_host_id(&list.host_id);
        Ok(list.sandboxes)
    }

    /// Records activity of a sandbox.
    pub async fn ping(&self, id: &str) -> Result<(), AgentError> {
        let request = rpc::PingSandboxRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        unary!(self.calls, ping_sandbox_with_options, request, CALL_TIMEOUT).map(drop)
    }

    /// Returns a log of a sandbox, also of one that failed and was removed.
    pub async fn sandbox_log(
        &self,
        id: &SandboxId,
        source: rpc::LogSource,
    ) -> Result<Vec<u8>, AgentError> {
        let request = rpc::GetSandboxLogRequest {
            id: id.to_string(),
            source: source.into(),
            ..Default::default()
        };
        let answer = unary!(
            self.calls,
            get_sandbox_log_with_options,
            request,
            CALL_TIMEOUT
        )?;
        Ok(answer.content)
    }

    /// Returns the current resource usage of a sandbox.
    pub async fn metrics(&self, id: &str) -> Result<rpc::GetMetricsResponse, AgentError> {
        let request = rpc::GetMetricsRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        unary!(self.calls, get_metrics_with_options, request, CALL_TIMEOUT)
    }
}
