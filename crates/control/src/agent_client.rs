//! Client of the host agent.
//!
//! Owns four pools of HTTP/1.1 connections, one per kind of call. A connection carries one call at
//! a time, so a command that hangs blocks only its own connection, and a burst of file transfers
//! cannot delay a destroy or a poll of the reconciler. Never retries, because a failed call may
//! have been executed.
//!
//! Calls have deadlines, except those that depend on the caller alone: commands without a time
//! limit, input, and uploads. A response stream has a deadline until the agent's first answer; its
//! length is determined by the user.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use connectrpc::{
    ConnectError, ErrorCode,
    client::{CallOptions, ClientConfig, HttpClient, ServerStream},
};
use wrenn_model::limits;
use wrenn_proto::{
    headers,
    rpc::hostagent::v1::{self as rpc, HostAgentServiceClient},
};

use crate::error::ControlError;

/// Deadline of a query of the host's state. Below the 5 s in which a create must answer.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);

/// Deadline of a small call into a guest.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Deadline for the start of a stream.
const STREAM_START_TIMEOUT: Duration = Duration::from_secs(30);

/// Time that a collected exec may take beyond its own limit.
const EXEC_MARGIN: Duration = Duration::from_secs(15);

/// Maximum size of an answer, in bytes: the two output streams of a collected exec, or a file.
const MAX_MESSAGE_BYTES: usize = limits::MAX_FILE_MESSAGE_BYTES + 1024 * 1024;

type Client = HostAgentServiceClient<HttpClient>;
type Body = hyper::body::Incoming;

/// Events of a process, as they arrive.
pub type ProcessStream = ServerStream<Body, rpc::ExecStreamResponseView<'static>>;

/// Parts of a file, as they arrive.
pub type FileStream = ServerStream<Body, rpc::ReadFileStreamResponseView<'static>>;

/// Failure of a call to the agent.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{code:?}: {message}")]
pub struct AgentError {
    /// Code reported by the agent, or the code that describes how the call was lost.
    pub code: ErrorCode,
    /// Message of the agent.
    pub message: String,
    /// True if the connection failed. The error is then not an answer of the agent.
    pub connection_lost: bool,
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
        }
    }

    fn timed_out(what: &str, limit: Duration) -> Self {
        Self {
            code: ErrorCode::DeadlineExceeded,
            message: format!("failed to {what} within {} s", limit.as_secs()),
            connection_lost: false,
        }
    }
}

impl From<ConnectError> for AgentError {
    fn from(error: ConnectError) -> Self {
        Self {
            code: error.code,
            // Only the transport attaches a source; an error that the agent sent has none.
            connection_lost: std::error::Error::source(&error).is_some(),
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
    streams: Client,
    /// Id of the agent's host, as last reported.
    host_id: Arc<Mutex<String>>,
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
            streams: client(),
            host_id: Arc::default(),
        })
    }

    /// Returns the id of the agent's host, as last reported; empty before the first answer.
    pub fn host_id(&self) -> String {
        let id = self.host_id.lock();
        id.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_host_id(&self, reported: &str) {
        // An agent of release 0.1.0 reports none.
        if reported.is_empty() {
            return;
        }
        let mut id = self.host_id.lock().unwrap_or_else(PoisonError::into_inner);
        if *id != reported {
            tracing::info!(host_id = reported, "connected to host");
            reported.clone_into(&mut id);
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

    /// Returns the current resource usage of a sandbox.
    pub async fn metrics(&self, id: &str) -> Result<rpc::GetMetricsResponse, AgentError> {
        let request = rpc::GetMetricsRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        unary!(self.calls, get_metrics_with_options, request, CALL_TIMEOUT)
    }

    /// Runs a command to its end. A command without a time limit has no deadline here either; the
    /// call ends with its caller.
    pub async fn exec(&self, request: rpc::ExecRequest) -> Result<rpc::ExecResponse, AgentError> {
        let mut options = CallOptions::default();
        if request.timeout_sec > 0 {
            let limit = Duration::from_secs(request.timeout_sec.into()) + EXEC_MARGIN;
            options = options.with_timeout(limit);
        }
        let response = self.calls.exec_with_options(request, options).await?;
        Ok(response.into_owned())
    }

    pub async fn exec_stream(
        &self,
        request: rpc::ExecStreamRequest,
    ) -> Result<ProcessStream, AgentError> {
        begun("start the process", self.streams.exec_stream(request)).await
    }

    pub async fn connect_process(
        &self,
        request: rpc::ConnectProcessRequest,
    ) -> Result<ProcessStream, AgentError> {
        let stream = self.streams.connect_process(request);
        begun("find the process", stream).await
    }

    pub async fn processes(&self, id: &str) -> Result<rpc::ListProcessesResponse, AgentError> {
        let request = rpc::ListProcessesRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        unary!(
            self.calls,
            list_processes_with_options,
            request,
            CALL_TIMEOUT
        )
    }

    /// Sends input to a process. The call waits while the process does not read, so it has no
    /// deadline of its own; its caller has one.
    pub async fn send_input(&self, request: rpc::SendInputRequest) -> Result<(), AgentError> {
        self.calls.send_input(request).await?;
        Ok(())
    }

    pub async fn close_stdin(&self, request: rpc::CloseStdinRequest) -> Result<(), AgentError> {
        unary!(self.calls, close_stdin_with_options, request, CALL_TIMEOUT).map(drop)
    }

    pub async fn resize(&self, request: rpc::ResizePtyRequest) -> Result<(), AgentError> {
        unary!(self.calls, resize_pty_with_options, request, CALL_TIMEOUT).map(drop)
    }

    pub async fn signal(&self, request: rpc::SignalProcessRequest) -> Result<(), AgentError> {
        unary!(
            self.calls,
            signal_process_with_options,
            request,
            CALL_TIMEOUT
        )
        .map(drop)
    }

    /// Sends a file. Ends early, with the agent's answer, if the agent rejects the file.
    pub async fn write_file(
        &self,
        parts: impl futures::Stream<Item = rpc::WriteFileStreamRequest> + Send + 'static,
    ) -> Result<u64, AgentError> {
        let response = self.streams.write_file_stream(parts).await?;
        Ok(response.view().size_bytes)
    }

    pub async fn read_file(&self, meta: rpc::FileMeta) -> Result<FileStream, AgentError> {
        let request = rpc::ReadFileStreamRequest {
            meta: meta.into(),
            ..Default::default()
        };
        begun("open the file", self.streams.read_file_stream(request)).await
    }

    pub async fn list_dir(
        &self,
        meta: rpc::FileMeta,
        depth: u32,
    ) -> Result<rpc::ListDirResponse, AgentError> {
        let request = rpc::ListDirRequest {
            meta: meta.into(),
            depth,
            ..Default::default()
        };
        unary!(self.calls, list_dir_with_options, request, CALL_TIMEOUT)
    }

    pub async fn make_dir(&self, meta: rpc::FileMeta) -> Result<rpc::MakeDirResponse, AgentError> {
        let request = rpc::MakeDirRequest {
            meta: meta.into(),
            ..Default::default()
        };
        unary!(self.calls, make_dir_with_options, request, CALL_TIMEOUT)
    }

    pub async fn remove(&self, meta: rpc::FileMeta) -> Result<(), AgentError> {
        let request = rpc::RemovePathRequest {
            meta: meta.into(),
            ..Default::default()
        };
        unary!(self.calls, remove_path_with_options, request, CALL_TIMEOUT).map(drop)
    }
}

async fn begun<T>(
    what: &str,
    stream: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, AgentError> {
    match tokio::time::timeout(STREAM_START_TIMEOUT, stream).await {
        Ok(stream) => Ok(stream?),
        Err(_) => Err(AgentError::timed_out(what, STREAM_START_TIMEOUT)),
    }
}
