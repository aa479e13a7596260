//! Guest agents of sandboxes: the control plane speaks their protocol (envd's) through the tunnel
//! of the host's agent.
//!
//! Owns one client, and so one pool of connections, per running sandbox. The pool is dropped when
//! the sandbox stops or is paused ([`Guests::forget`]); an exec does not open a tunnel unless all
//! open ones are in use. Deadlines are those of `wrenn-envd-client`. Never counts activity: its
//! callers hold an [`ActivityGuard`](crate::lifecycle::ActivityGuard) while they use a guest.
//!
//! A broken connection does not carry a reason. The control plane then requests another tunnel from
//! the agent, and derives the reason from the answer:
//!
//! | hop                | failure                                    | error                          |
//! |--------------------|--------------------------------------------|--------------------------------|
//! | control → agent    | unreachable, or its connection breaks      | lost: "does not answer", 503   |
//! |                    | no answer within 5 s                       | `deadline_exceeded`, 504       |
//! |                    | rejects the token, or knows no tunnels     | `unknown`, 502                 |
//! | agent, at the start| unknown sandbox                            | `not_found`, 404               |
//! |                    | sandbox paused, starting, lost, …          | `failed_precondition`, 409     |
//! |                    | too many tunnels                           | `resource_exhausted`, 503      |
//! | agent → guest      | guest agent does not accept connections    | `unavailable`, 503             |
//! | agent, in the call | sandbox lost, paused or destroyed          | `unavailable` and the agent's  |
//! |                    |                                            | reason, 503                    |
//! | guest              | breaks the connection, sandbox runs        | `unavailable`, 503             |
//! |                    | does not answer in time                    | `deadline_exceeded`, 504       |
//! |                    | output was not taken for too long          | `data_loss`, 504               |
//! |                    | rejects the call                           | its own code and message       |

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use connectrpc::{ConnectError, ErrorCode};
use futures::{Stream, future::BoxFuture};
use parking_lot::{Mutex, MutexGuard};
use wrenn_db::Sandbox;
use wrenn_envd_client::{Dial, Download, EnvdClient, Exec, ExecOutput, ProcessEvents};
use wrenn_model::{ByteBudget, Reservation, SandboxId};
use wrenn_proto::{
    guest,
    rpc::{
        filesystem::EntryInfo,
        process::{
            ProcessInfo, ProcessInput, ProcessSelector, Signal, StartRequest, process_event::Event,
        },
    },
};
use wrenn_proxy::{AgentTunnel, TunnelError};

use crate::{agent_client::AgentError, fleet::Fleet};

/// Time after which a client without calls has no open connection. Such a client is dropped.
const UNUSED_FOR: Duration = Duration::from_secs(90);

/// Interval at which calls in progress are counted.
const DRAIN_POLL: Duration = Duration::from_millis(10);

/// Clients of the guest agents of all sandboxes.
pub struct Guests {
    fleet: Fleet,
    /// Budget of the responses that are decoded as a whole.
    budget: ByteBudget,
    clients: Mutex<HashMap<SandboxId, Entry>>,
}

/// Client of one sandbox.
struct Entry {
    client: EnvdClient,
    route: Arc<Route>,
    token: String,
    /// Held by each call in progress.
    in_use: Arc<()>,
    used_at: Instant,
}

impl Entry {
    fn guest(&self) -> Guest {
        Guest {
            client: self.client.clone(),
            route: Arc::clone(&self.route),
            _in_use: Arc::clone(&self.in_use),
        }
    }

    fn calls(&self) -> usize {
        Arc::strong_count(&self.in_use) - 1
    }
}

impl Guests {
    /// Creates an empty set of clients. Guests are reached through the agents of their hosts.
    pub fn new(fleet: Fleet, budget: ByteBudget) -> Self {
        Self {
            fleet,
            budget,
            clients: Mutex::default(),
        }
    }

    /// Returns the guest agent of a running sandbox, for one call. Does not connect yet.
    pub fn get(&self, row: &Sandbox) -> Result<Guest, AgentError> {
        let mut clients = self.clients();
        let now = Instant::now();
        let known = clients
            .get_mut(&row.id)
            .filter(|entry| entry.token == row.envd_token);
        if let Some(entry) = known {
            entry.used_at = now;
            return Ok(entry.guest());
        }
        clients.retain(|_, entry| entry.calls() > 0 || now - entry.used_at < UNUSED_FOR);
        let Some(host) = self.fleet.connected(&row.host_id) else {
            return Err(self.fleet.other_host(&row.host_id).into());
        };
        let route = Arc::new(Route {
            tunnel: host.tunnel.clone(),
            id: row.id.clone(),
        });
        let entry = Entry {
            client: EnvdClient::new(Arc::clone(&route) as Arc<dyn Dial>, &row.envd_token)?
                .with_budget(self.budget.clone()),
            route,
            token: row.envd_token.clone(),
            in_use: Arc::default(),
            used_at: now,
        };
        let guest = entry.guest();
        clients.insert(row.id.clone(), entry);
        Ok(guest)
    }

    /// Drops the idle connections of a sandbox that stopped. The agent closes those in use.
    pub fn forget(&self, id: &SandboxId) {
        self.clients().remove(id);
    }

    /// Waits until no call to a sandbox is in progress, or until the limit.
    pub async fn drain(&self, id: &SandboxId, limit: Duration) {
        let drained = async {
            while self
                .clients()
                .get(id)
                .is_some_and(|entry| entry.calls() > 0)
            {
                tokio::time::sleep(DRAIN_POLL).await;
            }
        };
        if tokio::time::timeout(limit, drained).await.is_err() {
            tracing::info!(sandbox_id = %id, "drain deadline exceeded, cutting off calls in progress");
        }
    }

    fn clients(&self) -> MutexGuard<'_, HashMap<SandboxId, Entry>> {
        self.clients.lock()
    }
}

/// Path to the guest agent of one sandbox: the tunnel through the host's agent.
struct Route {
    tunnel: AgentTunnel,
    id: SandboxId,
}

impl Dial for Route {
    fn dial(&self) -> BoxFuture<'_, Result<wrenn_envd_client::Stream, ConnectError>> {
        Box::pin(async {
            let opened = self.tunnel.open(&self.id, guest::ENVD_PORT).await;
            opened
                .map(wrenn_envd_client::Stream::new)
                .map_err(not_opened)
        })
    }
}

/// Converts the error of a tunnel that was not opened. Only the error of an unreachable agent is
/// kept as the source, because it does not come from the agent.
fn not_opened(error: TunnelError) -> ConnectError {
    if error.is_port_closed() {
        return ConnectError::unavailable("failed to connect to the guest agent");
    }
    if let Some(message) = error.not_running() {
        return ConnectError::failed_precondition(message);
    }
    let is_unknown = error.is_unknown_sandbox();
    let is_too_many = error.is_too_many();
    match error {
        TunnelError::Rejected { message, .. } if is_unknown => ConnectError::not_found(message),
        TunnelError::Rejected { message, .. } if is_too_many => {
            ConnectError::resource_exhausted(message)
        }
        TunnelError::TimedOut(after) => ConnectError::deadline_exceeded(format!(
            "the host agent opened no connection to the guest within {after:?}"
        )),
        TunnelError::Unreachable(_) => {
            ConnectError::unavailable("the host agent does not answer").with_source(error)
        }
        other => ConnectError::unknown(format!("failed to open a tunnel: {other}")),
    }
}

impl Route {
    /// Returns the error of a call, with the reason for which its connection broke.
    async fn explain(&self, error: ConnectError) -> AgentError {
        let unreachable = match std::error::Error::source(&error) {
            None => return error.into(),
            Some(cause) => cause.is::<TunnelError>(),
        };
        if unreachable {
            return error.into();
        }
        tracing::debug!(sandbox_id = %self.id, %error, "connection to the guest agent lost");
        let unavailable = |message: &str| AgentError {
            code: ErrorCode::Unavailable,
            message: message.to_owned(),
            connection_lost: false,
            exit_code: None,
        };
        let lost = unavailable("the connection to the guest agent was lost");
        let Err(reason) = self.tunnel.open(&self.id, guest::ENVD_PORT).await else {
            return lost;
        };
        if reason.is_unknown_sandbox() {
            return unavailable(&format!("sandbox {} was destroyed", self.id));
        }
        if let Some(message) = reason.not_running() {
            return unavailable(message);
        }
        match reason {
            TunnelError::Unreachable(_) => not_opened(reason).into(),
            _ => lost,
        }
    }
}

/// Guest agent of a running sandbox, for one call or session. Each clone counts as a call in
/// progress.
#[derive(Clone)]
pub struct Guest {
    client: EnvdClient,
    route: Arc<Route>,
    _in_use: Arc<()>,
}

impl Guest {
    async fn explained<T>(&self, result: Result<T, ConnectError>) -> Result<T, AgentError> {
        match result {
            Ok(value) => Ok(value),
            Err(error) => Err(self.route.explain(error).await),
        }
    }

    /// Runs a command to its end. Its output is accounted to the budget of `reserved`.
    pub async fn exec(
        &self,
        exec: Exec,
        reserved: &mut Reservation,
    ) -> Result<ExecOutput, AgentError> {
        self.explained(self.client.exec_within(exec, reserved).await)
            .await
    }

    /// Starts a process.
    pub async fn start(
        &self,
        request: StartRequest,
        user: &str,
        timeout_sec: u32,
        detached: bool,
    ) -> Result<GuestEvents, AgentError> {
        let limit = time_limit(timeout_sec);
        let events = self.client.start(request, user, limit, detached).await;
        self.explained(events).await.map(|events| GuestEvents {
            events,
            guest: self.clone(),
        })
    }

    /// Streams the events of a running process from now on.
    pub async fn connect(&self, process: ProcessSelector) -> Result<GuestEvents, AgentError> {
        let events = self.client.connect(process).await;
        self.explained(events).await.map(|events| GuestEvents {
            events,
            guest: self.clone(),
        })
    }

    /// Returns the running processes that were started through the API.
    pub async fn processes(&self) -> Result<Vec<ProcessInfo>, AgentError> {
        self.explained(self.client.processes().await).await
    }

    /// Sends input to a process. Waits as long as the process does not read.
    pub async fn send_input(
        &self,
        process: ProcessSelector,
        input: ProcessInput,
    ) -> Result<(), AgentError> {
        self.explained(self.client.send_input(process, input).await)
            .await
    }

    /// Closes the input of a process.
    pub async fn close_stdin(&self, process: ProcessSelector) -> Result<(), AgentError> {
        self.explained(self.client.close_stdin(process).await).await
    }

    /// Changes the size of a terminal.
    pub async fn resize(
        &self,
        process: ProcessSelector,
        cols: u32,
        rows: u32,
    ) -> Result<(), AgentError> {
        self.explained(self.client.resize(process, cols, rows).await)
            .await
    }

    /// Sends a signal to a process.
    pub async fn signal(&self, process: ProcessSelector, signal: Signal) -> Result<(), AgentError> {
        self.explained(self.client.signal(process, signal).await)
            .await
    }

    /// Writes a file, which is complete at the end of `content`. Ends early if the guest rejects
    /// the file.
    pub async fn write_file(
        &self,
        path: &str,
        user: &str,
        content: impl Stream<Item = Result<Bytes, ConnectError>> + Send + 'static,
    ) -> Result<(), AgentError> {
        self.explained(self.client.upload(path, user, content).await)
            .await
    }

    /// Opens a file for reading.
    pub async fn read_file(&self, path: &str, user: &str) -> Result<GuestFile, AgentError> {
        let download = self.client.download(path, user).await;
        self.explained(download).await.map(|download| GuestFile {
            download,
            guest: self.clone(),
        })
    }

    /// Lists a directory.
    pub async fn list_dir(
        &self,
        path: &str,
        depth: u32,
        user: &str,
    ) -> Result<Vec<EntryInfo>, AgentError> {
        self.explained(self.client.list_dir(path, depth, user).await)
            .await
    }

    /// Creates a directory and its parents.
    pub async fn make_dir(&self, path: &str, user: &str) -> Result<EntryInfo, AgentError> {
        self.explained(self.client.make_dir(path, user).await).await
    }

    /// Removes a file, or a directory with its content.
    pub async fn remove(&self, path: &str, user: &str) -> Result<(), AgentError> {
        self.explained(self.client.remove(path, user).await).await
    }
}

/// Converts a time limit in seconds; 0 means no limit.
pub fn time_limit(seconds: u32) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(seconds.into()))
}

/// Events of a process, as they arrive.
pub struct GuestEvents {
    events: ProcessEvents,
    guest: Guest,
}

impl GuestEvents {
    /// Returns the next event, or `None` at the end of the stream.
    pub async fn next(&mut self) -> Result<Option<Event>, AgentError> {
        loop {
            let event = self.guest.explained(self.events.next().await).await?;
            match event.map(|event| event.event) {
                None => return Ok(None),
                // An event of a kind that this version does not know.
                Some(None) => {}
                Some(Some(event)) => return Ok(Some(event)),
            }
        }
    }
}

/// File that is being read from a guest.
pub struct GuestFile {
    download: Download,
    guest: Guest,
}

impl GuestFile {
    /// Returns the length of the file, in bytes; `None` if it is not known yet.
    pub fn length(&self) -> Option<u64> {
        self.download.length()
    }

    /// Returns the next piece of the file, or `None` at its end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, AgentError> {
        self.guest.explained(self.download.next().await).await
    }
}
