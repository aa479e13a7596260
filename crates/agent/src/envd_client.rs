//! Client for the guest agent (`envd`): Connect calls and whole-file transfers, over HTTP/1.1.
//!
//! There is one client per sandbox with its own connections, so a hung guest affects no other
//! sandbox. Calls have deadlines. Streams have none; they live as long as the sandbox, which the
//! caller must watch. Errors are the guest agent's own, with their codes.

mod files;
mod guest_error;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use connectrpc::{
    ConnectError, ErrorCode,
    client::{CallOptions, ClientConfig, HttpClient, ServerStream},
};
use http::{HeaderValue, Request, Response, Uri, header};
use http_body_util::{BodyExt as _, Limited, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use serde::{Deserialize, Serialize};
use wrenn_proto::{
    guest, headers,
    rpc::{
        filesystem::{EntryInfo, FilesystemClient, ListDirRequest, MakeDirRequest, RemoveRequest},
        process::{
            CloseStdinRequest, ConnectRequest, ConnectResponseView, ListRequest, ProcessClient,
            ProcessInfo, SendInputRequest, SendSignalRequest, StartRequest, StartResponseView,
            UpdateRequest,
        },
    },
};

pub(crate) use files::Download;

/// Deadline of a call that does not wait for anything in the guest. Such a call takes seconds under
/// software virtualization and load.
const CALL_DEADLINE: Duration = Duration::from_secs(60);

/// Deadline for the guest to prepare for a snapshot. The guest first writes all dirty data to its
/// disk.
const PREPARE_DEADLINE: Duration = Duration::from_secs(60);

/// Deadline of one connection attempt. A guest that is not up yet does not respond at all, so a
/// longer attempt would delay detecting that it came up. A refused connection is reported at once.
const PROBE_DEADLINE: Duration = Duration::from_millis(40);

/// Deadline for the health response of a guest that accepted a connection.
const HEALTH_DEADLINE: Duration = Duration::from_secs(5);

/// Maximum idle time of a pooled connection.
const IDLE_DEADLINE: Duration = Duration::from_secs(60);

/// Maximum response size of a call, in bytes. Listings of large directories are the largest.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;

/// Maximum size of `/metrics` responses and error bodies, in bytes.
const MAX_SMALL_ANSWER_BYTES: usize = 64 * 1024;

/// Header with the token that the guest agent requires from its clients.
const ACCESS_TOKEN: &str = "x-access-token";

/// Body of a plain HTTP request.
type RequestBody = UnsyncBoxBody<Bytes, std::io::Error>;

type Transport = HttpClient;
type TransportBody = <Transport as connectrpc::client::ClientTransport>::ResponseBody;

/// Events of a newly started process.
pub(crate) type StartStream = ServerStream<TransportBody, StartResponseView<'static>>;
/// Events of a process that is already running.
pub(crate) type ConnectStream = ServerStream<TransportBody, ConnectResponseView<'static>>;

/// Settings that the guest agent receives before its first use (`POST /init`).
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Init<'a> {
    pub(crate) access_token: &'a str,
    pub(crate) env_vars: &'a BTreeMap<String, String>,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) default_user: &'a str,
    /// RFC 3339. The guest agent ignores settings older than those it already has.
    pub(crate) timestamp: String,
}

/// Identity of the guest after a snapshot or a restore (`POST /snapshot/recover`). Omitted fields
/// stay unchanged.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Recover<'a> {
    /// Random bytes for the guest's random number generator, base64.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) entropy: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) sandbox_id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) template_id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) hostname: &'a str,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) machine_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) env_vars: Option<&'a BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) access_token: Option<&'a str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) default_user: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) nameservers: Option<&'a [std::net::Ipv4Addr]>,
}

impl Recover<'_> {
    /// Keeps the guest's identity and supplies fresh entropy, because other VMs may run from the
    /// same snapshot.
    pub(crate) fn same() -> Self {
        Self {
            entropy: entropy(),
            ..Self::default()
        }
    }
}

/// Returns fresh random bytes for a guest, base64.
pub(crate) fn entropy() -> String {
    BASE64_STANDARD.encode(rand::random::<[u8; 64]>())
}

/// Resource usage as reported by the guest.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Metrics {
    /// Unix timestamp, in seconds.
    pub(crate) ts: i64,
    pub(crate) cpu_count: u32,
    pub(crate) cpu_used_pct: f64,
    pub(crate) mem_total: u64,
    pub(crate) mem_used: u64,
    pub(crate) mem_cache: u64,
    pub(crate) disk_used: u64,
    pub(crate) disk_total: u64,
}

/// Client for the guest agent of one sandbox.
#[derive(Clone)]
pub(crate) struct EnvdClient {
    address: SocketAddr,
    token: HeaderValue,
    process: ProcessClient<Transport>,
    filesystem: FilesystemClient<Transport>,
    http: Client<HttpConnector, RequestBody>,
}

impl std::fmt::Debug for EnvdClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("EnvdClient").field(&self.address).finish()
    }
}

impl EnvdClient {
    /// Creates a client for the guest at `ip`. Does not connect yet.
    pub(crate) fn new(ip: IpAddr, token: &str) -> Result<Self, ConnectError> {
        let address = SocketAddr::new(ip, guest::ENVD_PORT);
        let token = token_header(token)?;
        let base: Uri = format!("http://{address}").parse().map_err(|_| {
            ConnectError::internal("failed to build a URI from the guest's address")
        })?;
        let config = ClientConfig::new(base)
            .with_default_header(ACCESS_TOKEN, token.clone())
            .with_default_max_message_size(MAX_ANSWER_BYTES);
        let transport = HttpClient::plaintext();
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(HEALTH_DEADLINE));
        let http = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_DEADLINE)
            .build(connector);
        Ok(Self {
            address,
            token,
            process: ProcessClient::new(transport.clone(), config.clone()),
            filesystem: FilesystemClient::new(transport, config),
            http,
        })
    }

    /// Returns a client on the same connections that sends another token with its plain HTTP
    /// requests.
    pub(crate) fn showing(&self, token: &str) -> Result<Self, ConnectError> {
        Ok(Self {
            token: token_header(token)?,
            ..self.clone()
        })
    }

    /// True if the guest agent reports that it is healthy. Cheap enough to be polled while a guest
    /// boots.
    pub(crate) async fn is_healthy(&self) -> bool {
        let probe = tokio::net::TcpStream::connect(self.address);
        if !matches!(tokio::time::timeout(PROBE_DEADLINE, probe).await, Ok(Ok(_))) {
            return false;
        }
        let answer = self.get("/health", HEALTH_DEADLINE).await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// Sends the guest agent its settings.
    pub(crate) async fn init(&self, init: &Init<'_>) -> Result<(), ConnectError> {
        self.post("/init", init, CALL_DEADLINE).await
    }

    /// Prepares the guest for the snapshot `build`.
    pub(crate) async fn prepare(&self, build: &str, keep_cache: bool) -> Result<(), ConnectError> {
        let body = serde_json::json!({ "snapshotId": build, "keepCache": keep_cache });
        self.post("/snapshot/prepare", &body, PREPARE_DEADLINE)
            .await
    }

    /// Ends the state that [`prepare`](Self::prepare) began: after a snapshot, after a restore, or
    /// if neither takes place.
    pub(crate) async fn recover(&self, recover: &Recover<'_>) -> Result<(), ConnectError> {
        self.post("/snapshot/recover", recover, CALL_DEADLINE).await
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
            .request(http::Method::POST, path)
            .header(header::CONTENT_TYPE, "application/json")
            .body(full(body))
            .map_err(bad_request)?;
        let answer = self.send(request, deadline).await?;
        guest_error::check(answer, "").await.map(drop)
    }

    /// Returns the guest's resource usage.
    pub(crate) async fn metrics(&self) -> Result<Metrics, ConnectError> {
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

    /// Starts a process. `time_limit` limits the process, not the call. The output of a `detached`
    /// process is not streamed.
    pub(crate) async fn start(
        &self,
        request: StartRequest,
        user: &str,
        time_limit: Option<Duration>,
        detached: bool,
    ) -> Result<StartStream, ConnectError> {
        let mut options = as_user(CallOptions::default(), user)?;
        if detached {
            options = options.try_with_header(headers::DETACHED, "1")?;
        }
        if let Some(limit) = time_limit {
            // Sent as a header, so that only the guest enforces it and the exit event still
            // arrives.
            options =
                options.try_with_header("connect-timeout-ms", limit.as_millis().to_string())?;
        }
        let call = self.process.start_with_options(request, options);
        within(CALL_DEADLINE, call)
            .await
            .map_err(unknown_user(user))
    }

    /// Streams the output of a running process from now on.
    pub(crate) async fn connect(
        &self,
        request: ConnectRequest,
    ) -> Result<ConnectStream, ConnectError> {
        within(CALL_DEADLINE, self.process.connect(request)).await
    }

    pub(crate) async fn processes(&self) -> Result<Vec<ProcessInfo>, ConnectError> {
        let answer = within(CALL_DEADLINE, self.process.list(ListRequest::default())).await?;
        Ok(answer.into_owned().processes)
    }

    pub(crate) async fn send_input(&self, request: SendInputRequest) -> Result<(), ConnectError> {
        // No deadline: a process that does not read its input blocks the sender, as a pipe does.
        self.process.send_input(request).await.map(drop)
    }

    pub(crate) async fn close_stdin(&self, request: CloseStdinRequest) -> Result<(), ConnectError> {
        within(CALL_DEADLINE, self.process.close_stdin(request))
            .await
            .map(drop)
    }

    pub(crate) async fn update(&self, request: UpdateRequest) -> Result<(), ConnectError> {
        within(CALL_DEADLINE, self.process.update(request))
            .await
            .map(drop)
    }

    pub(crate) async fn signal(&self, request: SendSignalRequest) -> Result<(), ConnectError> {
        within(CALL_DEADLINE, self.process.send_signal(request))
            .await
            .map(drop)
    }

    pub(crate) async fn list_dir(
        &self,
        request: ListDirRequest,
        user: &str,
    ) -> Result<Vec<EntryInfo>, ConnectError> {
        let options = as_user(CallOptions::default(), user)?;
        let call = self.filesystem.list_dir_with_options(request, options);
        let answer = within(CALL_DEADLINE, call)
            .await
            .map_err(unknown_user(user))?;
        Ok(answer.into_owned().entries)
    }

    pub(crate) async fn make_dir(
        &self,
        request: MakeDirRequest,
        user: &str,
    ) -> Result<Option<EntryInfo>, ConnectError> {
        let options = as_user(CallOptions::default(), user)?;
        let call = self.filesystem.make_dir_with_options(request, options);
        let answer = within(CALL_DEADLINE, call)
            .await
            .map_err(unknown_user(user))?;
        Ok(answer.into_owned().entry.into_option())
    }

    pub(crate) async fn remove(
        &self,
        request: RemoveRequest,
        user: &str,
    ) -> Result<(), ConnectError> {
        let options = as_user(CallOptions::default(), user)?;
        let call = self.filesystem.remove_with_options(request, options);
        within(CALL_DEADLINE, call)
            .await
            .map_err(unknown_user(user))
            .map(drop)
    }

    fn request(&self, method: http::Method, path_and_query: &str) -> http::request::Builder {
        Request::builder()
            .method(method)
            .uri(format!("http://{}{path_and_query}", self.address))
            .header(ACCESS_TOKEN, self.token.clone())
    }

    async fn get(
        &self,
        path: &str,
        deadline: Duration,
    ) -> Result<Response<Incoming>, ConnectError> {
        let request = self.request(http::Method::GET, path);
        let request = request.body(full(Bytes::new())).map_err(bad_request)?;
        self.send(request, deadline).await
    }

    async fn send(
        &self,
        request: Request<RequestBody>,
        deadline: Duration,
    ) -> Result<Response<Incoming>, ConnectError> {
        let answer = async { self.http.request(request).await.map_err(transport_failed) };
        within(deadline, answer).await
    }
}

/// Runs a call with a deadline.
async fn within<T>(
    deadline: Duration,
    call: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    tokio::time::timeout(deadline, call)
        .await
        .unwrap_or_else(|_| {
            Err(ConnectError::deadline_exceeded(format!(
                "the guest agent did not respond within {deadline:?}"
            )))
        })
}

/// Sets the guest user that the call runs as. With an empty `user`, the guest agent chooses its
/// default.
fn as_user(options: CallOptions, user: &str) -> Result<CallOptions, ConnectError> {
    match basic_auth(user)? {
        Some(value) => options.try_with_header(header::AUTHORIZATION, value),
        None => Ok(options),
    }
}

fn basic_auth(user: &str) -> Result<Option<String>, ConnectError> {
    if user.is_empty() {
        return Ok(None);
    }
    if user.contains(':') || user.chars().any(char::is_control) {
        return Err(ConnectError::invalid_argument(format!(
            "`user`: {user:?} is not a valid user name"
        )));
    }
    let credentials = BASE64_STANDARD.encode(format!("{user}:"));
    Ok(Some(format!("Basic {credentials}")))
}

/// Maps the guest agent's "unauthenticated" to "invalid argument": for callers of this client, an
/// unknown user is a wrong argument, not a lack of credentials.
fn unknown_user(user: &str) -> impl Fn(ConnectError) -> ConnectError {
    let user = user.to_owned();
    move |mut error| {
        if error.code == ErrorCode::Unauthenticated && !user.is_empty() {
            error.code = ErrorCode::InvalidArgument;
        }
        error
    }
}

fn token_header(token: &str) -> Result<HeaderValue, ConnectError> {
    let mut header = HeaderValue::from_str(token).map_err(|_| {
        ConnectError::internal("the guest agent's token is not a valid header value")
    })?;
    header.set_sensitive(true);
    Ok(header)
}

fn full(body: impl Into<Bytes>) -> RequestBody {
    let body = http_body_util::Full::new(body.into());
    UnsyncBoxBody::new(body.map_err(|never| match never {}))
}

fn bad_request(error: http::Error) -> ConnectError {
    ConnectError::invalid_argument(format!("invalid request: {error}"))
}

fn transport_failed(error: hyper_util::client::legacy::Error) -> ConnectError {
    let what = if error.is_connect() {
        "failed to connect to the guest agent"
    } else {
        "the connection to the guest agent was lost"
    };
    ConnectError::unavailable(what).with_source(error)
}

#[cfg(test)]
mod tests;
