//! A fake host agent without VMs. It keeps lists, follows the settings of the tests, and counts
//! calls.

mod guest;
mod machine;
mod service;
mod tunnel;

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    extract::{Request, State as Shared},
    middleware::{self, Next},
    response::{IntoResponse, Response as HttpResponse},
};
pub(crate) use connectrpc::ErrorCode;
use connectrpc::{ConnectError, Router};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use wrenn_envd::process::output::PATIENCE;
use wrenn_proto::rpc::hostagent::v1 as rpc;

use guest::Guest;
use service::Service;

/// Token that the fake requires.
pub(crate) const TOKEN: &str = "secret-of-the-tests";

/// Name under which tunnels to guest agents are counted, like the name of a method.
pub(crate) const TUNNEL: &str = "49983";

/// Running fake.
pub(crate) struct FakeAgent {
    address: SocketAddr,
    pub(crate) state: Arc<State>,
    server: Option<JoinHandle<()>>,
    down: CancellationToken,
}

/// Gate that calls wait at. It is open, or closed until the test opens it.
pub(crate) struct Gate {
    /// Number of calls that may still pass.
    room: watch::Sender<usize>,
    waiting: AtomicUsize,
}

/// Room for any number of calls.
const OPEN: usize = usize::MAX;

impl Gate {
    fn new() -> Self {
        Self {
            room: watch::Sender::new(OPEN),
            waiting: AtomicUsize::new(0),
        }
    }

    pub(crate) fn shut(&self) {
        self.room.send_replace(0);
    }

    pub(crate) fn open(&self) {
        self.room.send_replace(OPEN);
    }

    /// Lets one call through a closed gate: a waiting call, or else the next one.
    pub(crate) fn admit_one(&self) {
        self.room.send_modify(|room| *room += 1);
    }

    /// Returns the number of waiting calls.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    async fn pass(&self) {
        struct Waiting<'a>(&'a AtomicUsize);
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let _waiting = Waiting(&self.waiting);
        let mut room = self.room.subscribe();
        while !self.enter() && room.changed().await.is_ok() {}
    }

    /// Takes room, if there is any.
    fn enter(&self) -> bool {
        let mut entered = false;
        self.room.send_if_modified(|room| {
            entered = *room > 0;
            if entered && *room != OPEN {
                *room -= 1;
            }
            false
        });
        entered
    }
}

/// Fake sandbox, without a VM.
#[derive(Clone)]
pub(crate) struct FakeSandbox {
    pub(crate) state: rpc::SandboxState,
    pub(crate) reason: String,
    pub(crate) warning: String,
    pub(crate) last_active_ms: i64,
    request: rpc::CreateSandboxRequest,
}

/// State and settings of the fake.
pub(crate) struct State {
    /// Id that the fake reports as its host's.
    pub(crate) host_id: Mutex<String>,
    sandboxes: Mutex<HashMap<String, FakeSandbox>>,
    /// Guests of the sandboxes that were reached. A guest survives pauses.
    guests: tokio::sync::Mutex<HashMap<String, Guest>>,
    /// Cancelled to close the tunnels of a sandbox.
    cuts: Mutex<HashMap<String, CancellationToken>>,
    /// Directory for the files of all guests.
    dir: tempfile::TempDir,
    /// Answer of all guests, instead of those of their agents.
    answer: Mutex<Option<Vec<u8>>>,
    /// First bytes that guests received.
    heard: Mutex<Vec<u8>>,
    /// Time after which new guests drop a client that takes no output.
    pub(crate) patience: Mutex<Duration>,
    /// Creates wait here, after the sandbox is listed as starting.
    pub(crate) create_gate: Gate,
    pub(crate) host_gate: Gate,
    /// List calls wait here before the list is made.
    pub(crate) list_gate: Gate,
    /// Destroys wait here.
    pub(crate) destroy_gate: Gate,
    /// Tunnels wait here before they pass bytes to guests.
    pub(crate) upload_gate: Gate,
    pub(crate) pause_gate: Gate,
    pub(crate) resume_gate: Gate,
    /// Snapshots wait here, while the VM is paused.
    pub(crate) snapshot_gate: Gate,
    pub(crate) fork_gate: Gate,
    /// Errors of calls that fail, by method name.
    errors: Mutex<HashMap<String, ConnectError>>,
    /// Number of replies to drop, by method name. The connection breaks after the work is done.
    dropped_replies: Mutex<HashMap<String, usize>>,
    /// Number of received calls, by method name.
    calls: Mutex<HashMap<String, usize>>,
    /// Sandboxes that are being paused, resumed or copied.
    busy: Mutex<HashSet<String>>,
    /// Number of operations that were started on a busy sandbox.
    overlaps: AtomicUsize,
    templates: Mutex<Vec<rpc::TemplateInfo>>,
    /// Duration of every create.
    pub(crate) create_delay: Mutex<Duration>,
    last_create: Mutex<Option<rpc::CreateSandboxRequest>>,
    /// Efforts of the requested pauses.
    efforts: Mutex<Vec<rpc::PauseEffort>>,
    /// True if the last resume requested a boot from disk.
    pub(crate) cold_boot: AtomicBool,
    last_network: Mutex<Option<rpc::UpdateNetworkRequest>>,
    /// Number of bytes passed to guests so far.
    pub(crate) upload_bytes: AtomicUsize,
    /// Number of bytes passed on from guests so far.
    pub(crate) download_bytes: AtomicUsize,
    /// Number of bytes from a guest in one connection after which its sandbox is lost.
    pub(crate) lost_after: AtomicUsize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

pub(crate) fn now_ms() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    i64::try_from(now.unwrap().as_millis()).unwrap()
}

impl FakeAgent {
    pub(crate) async fn start() -> Self {
        let state = Arc::new(State {
            host_id: Mutex::new("host-of-the-tests".to_owned()),
            sandboxes: Mutex::default(),
            guests: tokio::sync::Mutex::default(),
            cuts: Mutex::default(),
            dir: tempfile::tempdir().unwrap(),
            answer: Mutex::default(),
            heard: Mutex::default(),
            patience: Mutex::new(PATIENCE),
            create_gate: Gate::new(),
            host_gate: Gate::new(),
            list_gate: Gate::new(),
            destroy_gate: Gate::new(),
            upload_gate: Gate::new(),
            pause_gate: Gate::new(),
            resume_gate: Gate::new(),
            snapshot_gate: Gate::new(),
            fork_gate: Gate::new(),
            errors: Mutex::default(),
            dropped_replies: Mutex::default(),
            calls: Mutex::default(),
            busy: Mutex::default(),
            overlaps: AtomicUsize::new(0),
            templates: Mutex::new(vec![minimal()]),
            create_delay: Mutex::default(),
            last_create: Mutex::default(),
            efforts: Mutex::default(),
            cold_boot: AtomicBool::new(false),
            last_network: Mutex::default(),
            upload_bytes: AtomicUsize::new(0),
            download_bytes: AtomicUsize::new(0),
            lost_after: AtomicUsize::new(usize::MAX),
        });
        let mut agent = Self {
            address: "127.0.0.1:0".parse().unwrap(),
            state,
            server: None,
            down: CancellationToken::new(),
        };
        agent.up().await;
        agent
    }

    /// Starts to listen, at the previous address.
    pub(crate) async fn up(&mut self) {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        let listener = socket.listen(1024).unwrap();
        self.address = listener.local_addr().unwrap();
        self.down = CancellationToken::new();
        let router = Router::new()
            .add_service(Arc::new(Service(Arc::clone(&self.state))))
            .into_axum_router()
            .route(
                "/tunnel/{id}/{port}",
                axum::routing::get(tunnel::open)
                    .with_state((Arc::clone(&self.state), self.down.clone())),
            )
            .layer(middleware::from_fn_with_state(
                (Arc::clone(&self.state), self.down.clone()),
                count,
            ))
            .layer(middleware::from_fn(authorize));
        self.server = Some(tokio::spawn(async move {
            axum::serve(listener, router).await.unwrap();
        }));
    }

    /// Stops listening and breaks all connections. Work in progress continues.
    pub(crate) async fn down(&mut self) {
        self.down.cancel();
        if let Some(server) = self.server.take() {
            server.abort();
            let _ = server.await;
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the ids of all sandboxes, sorted.
    pub(crate) fn ids(&self) -> Vec<String> {
        let mut ids: Vec<_> = lock(&self.state.sandboxes).keys().cloned().collect();
        ids.sort();
        ids
    }

    /// Returns the number of calls of a method.
    pub(crate) fn calls(&self, method: &str) -> usize {
        lock(&self.state.calls).get(method).copied().unwrap_or(0)
    }

    /// Returns the number of tunnels to guest agents that were requested.
    pub(crate) fn tunnels(&self) -> usize {
        self.calls(TUNNEL)
    }

    /// Returns the path of a file in the directory for the guests' files.
    pub(crate) fn path(&self, name: &str) -> String {
        self.state
            .dir
            .path()
            .join(name)
            .to_str()
            .unwrap()
            .to_owned()
    }

    /// Returns the names of all files in that directory, sorted.
    pub(crate) fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.state.dir.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    /// Creates a file of zeros in that directory and returns its path.
    pub(crate) fn zeros(&self, length: u64) -> String {
        let path = self.path("zeros");
        std::fs::File::create(&path)
            .unwrap()
            .set_len(length)
            .unwrap();
        path
    }

    /// Makes every create of `minimal` boot, for this reason.
    pub(crate) fn boot_minimal(&self, reason: &str) {
        let mut templates = lock(&self.state.templates);
        templates[0].cold_boot_reason = reason.to_owned();
    }

    /// Closes the open tunnels of a sandbox, which keeps running.
    pub(crate) fn cut_tunnels(&self, id: &str) {
        self.state.cut(id);
    }

    /// Makes all guests give this answer to every request, or lets their agents answer again.
    pub(crate) fn answer(&self, answer: Option<Vec<u8>>) {
        *lock(&self.state.answer) = answer;
    }

    /// Returns the first bytes that guests received since the last call, as text.
    pub(crate) fn heard(&self) -> String {
        let heard = std::mem::take(&mut *lock(&self.state.heard));
        String::from_utf8_lossy(&heard).into_owned()
    }

    /// Makes a method fail.
    pub(crate) fn fail(&self, method: &str, code: ErrorCode, message: &str) {
        let error = ConnectError::new(code, message);
        lock(&self.state.errors).insert(method.to_owned(), error);
    }

    /// Makes a method succeed again.
    pub(crate) fn mend(&self, method: &str) {
        lock(&self.state.errors).remove(method);
    }

    /// Drops the next replies of a method.
    pub(crate) fn drop_replies(&self, method: &str, count: usize) {
        lock(&self.state.dropped_replies).insert(method.to_owned(), count);
    }

    /// Returns the number of operations that were started on a busy sandbox.
    pub(crate) fn overlaps(&self) -> usize {
        self.state.overlaps.load(Ordering::SeqCst)
    }

    pub(crate) fn last_create(&self) -> rpc::CreateSandboxRequest {
        lock(&self.state.last_create).clone().unwrap()
    }

    /// Returns the efforts of the pauses that were requested so far.
    pub(crate) fn efforts(&self) -> Vec<rpc::PauseEffort> {
        lock(&self.state.efforts).clone()
    }

    pub(crate) fn last_network(&self) -> rpc::UpdateNetworkRequest {
        lock(&self.state.last_network).clone().unwrap()
    }

    pub(crate) fn template_names(&self) -> Vec<String> {
        let templates = lock(&self.state.templates);
        templates.iter().map(|t| t.name.clone()).collect()
    }

    pub(crate) fn sandbox(&self, id: &str) -> Option<FakeSandbox> {
        lock(&self.state.sandboxes).get(id).cloned()
    }

    /// Changes a sandbox as the fake reports it.
    pub(crate) fn change(&self, id: &str, change: impl FnOnce(&mut FakeSandbox)) {
        let state = {
            let mut sandboxes = lock(&self.state.sandboxes);
            let sandbox = sandboxes.get_mut(id).unwrap();
            change(sandbox);
            sandbox.state
        };
        if state != rpc::SandboxState::SANDBOX_STATE_RUNNING {
            self.state.cut(id);
        }
    }

    /// Forgets a sandbox.
    pub(crate) fn lose(&self, id: &str) {
        lock(&self.state.sandboxes).remove(id);
        self.state.cut(id);
    }

    /// Removes a sandbox, to be put back by [`show`](Self::show).
    pub(crate) fn hide(&self, id: &str) -> FakeSandbox {
        lock(&self.state.sandboxes).remove(id).unwrap()
    }

    pub(crate) fn show(&self, id: &str, sandbox: FakeSandbox) {
        lock(&self.state.sandboxes).insert(id.to_owned(), sandbox);
    }

    /// Adds a sandbox that no client has requested.
    pub(crate) fn plant(&self, id: &str, state: rpc::SandboxState) {
        let sandbox = FakeSandbox {
            state,
            reason: String::new(),
            warning: String::new(),
            last_active_ms: now_ms(),
            request: rpc::CreateSandboxRequest {
                id: id.to_owned(),
                ..Default::default()
            },
        };
        lock(&self.state.sandboxes).insert(id.to_owned(), sandbox);
    }
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
        }
    }
}

async fn authorize(request: Request, next: Next) -> HttpResponse {
    let given = request.headers().get("authorization");
    if given.and_then(|v| v.to_str().ok()) == Some(&format!("Bearer {TOKEN}")) {
        return next.run(request).await;
    }
    http::StatusCode::UNAUTHORIZED.into_response()
}

/// Counts calls. Breaks the connection if the reply is to be dropped or the agent is down.
async fn count(
    Shared((state, down)): Shared<(Arc<State>, CancellationToken)>,
    request: Request,
    next: Next,
) -> HttpResponse {
    let path = request.uri().path().to_owned();
    let method = path.rsplit('/').next().unwrap_or_default();
    *lock(&state.calls).entry(method.to_owned()).or_default() += 1;
    let response = tokio::select! {
        biased;
        () = down.cancelled() => break_connection(),
        response = next.run(request) => response,
    };
    if state.drops_reply(method) {
        break_connection();
    }
    response
}

/// Ends the task of the connection, without the output of a panic.
fn break_connection() -> ! {
    std::panic::resume_unwind(Box::new("the connection is lost"))
}

impl State {
    fn drops_reply(&self, method: &str) -> bool {
        let mut dropped = lock(&self.dropped_replies);
        match dropped.get_mut(method) {
            Some(left) if *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }
}

fn minimal() -> rpc::TemplateInfo {
    rpc::TemplateInfo {
        name: "minimal".to_owned(),
        vcpus: 1,
        memory_mb: 256,
        size_bytes: 1 << 29,
        created_unix_ms: 1_700_000_000_000,
        kind: rpc::TemplateKind::TEMPLATE_KIND_BASE.into(),
        ..Default::default()
    }
}
