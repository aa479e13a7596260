//! A host agent without machines: it keeps lists, obeys the tests' knobs, and counts.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    extract::Request,
    middleware::{self, Next},
    response::{IntoResponse, Response as HttpResponse},
};
use connectrpc::{
    ConnectError, ErrorCode, InboundStream, RequestContext, Response, Router, ServiceRequest,
    ServiceResult, ServiceStream,
};
use futures::StreamExt;
use tokio::{sync::watch, task::JoinHandle};
use wrenn_proto::rpc::{
    filesystem,
    hostagent::v1::{self as rpc, HostAgentService, write_file_stream_request::PartView},
};

use super::processes::{self, Processes};

/// What it asks of its callers.
pub(crate) const TOKEN: &str = "secret-of-the-tests";

/// A running fake.
pub(crate) struct FakeAgent {
    address: SocketAddr,
    pub(crate) state: Arc<State>,
    server: Option<JoinHandle<()>>,
}

/// A gate that calls stop at: open, or shut until the test opens it.
pub(crate) struct Gate {
    open: watch::Sender<bool>,
    waiting: AtomicUsize,
}

impl Gate {
    fn new() -> Self {
        Self {
            open: watch::Sender::new(true),
            waiting: AtomicUsize::new(0),
        }
    }

    pub(crate) fn shut(&self) {
        self.open.send_replace(false);
    }

    pub(crate) fn open(&self) {
        self.open.send_replace(true);
    }

    /// Calls that stand at it.
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
        let _ = self.open.subscribe().wait_for(|open| *open).await;
    }
}

/// A machine that is not one.
#[derive(Clone)]
pub(crate) struct FakeSandbox {
    pub(crate) state: rpc::SandboxState,
    pub(crate) reason: String,
    pub(crate) last_active_ms: i64,
    request: rpc::CreateSandboxRequest,
}

/// What it knows, and its knobs.
pub(crate) struct State {
    sandboxes: Mutex<HashMap<String, FakeSandbox>>,
    pub(crate) files: Mutex<HashMap<String, Vec<u8>>>,
    pub(crate) processes: Processes,
    /// Creates stop here, after the sandbox is listed as starting.
    pub(crate) create_gate: Gate,
    /// Destroys stop here.
    pub(crate) destroy_gate: Gate,
    /// Uploads stop here before each piece is read.
    pub(crate) upload_gate: Gate,
    /// Makes every create fail.
    pub(crate) create_error: Mutex<Option<ConnectError>>,
    /// Makes every exec fail.
    pub(crate) exec_error: Mutex<Option<ConnectError>>,
    /// What every create takes.
    pub(crate) create_delay: Mutex<Duration>,
    pub(crate) creates: AtomicUsize,
    pub(crate) destroys: AtomicUsize,
    /// Uploads that ended without their end.
    pub(crate) broken_uploads: AtomicUsize,
    /// Pieces of uploads that came so far.
    pub(crate) upload_bytes: AtomicUsize,
    /// Bytes of downloads that were given so far.
    pub(crate) download_bytes: AtomicUsize,
    /// A download of more than one piece breaks after the first.
    pub(crate) break_downloads: AtomicBool,
    pub(crate) egress: Mutex<Option<rpc::Egress>>,
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
            sandboxes: Mutex::default(),
            files: Mutex::default(),
            processes: Processes::default(),
            create_gate: Gate::new(),
            destroy_gate: Gate::new(),
            upload_gate: Gate::new(),
            create_error: Mutex::default(),
            exec_error: Mutex::default(),
            create_delay: Mutex::default(),
            creates: AtomicUsize::new(0),
            destroys: AtomicUsize::new(0),
            broken_uploads: AtomicUsize::new(0),
            upload_bytes: AtomicUsize::new(0),
            download_bytes: AtomicUsize::new(0),
            break_downloads: AtomicBool::new(false),
            egress: Mutex::default(),
        });
        let mut agent = Self {
            address: "127.0.0.1:0".parse().unwrap(),
            state,
            server: None,
        };
        agent.up().await;
        agent
    }

    /// Starts to listen, where it listened before.
    pub(crate) async fn up(&mut self) {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        let listener = socket.listen(1024).unwrap();
        self.address = listener.local_addr().unwrap();
        let router = Router::new()
            .add_service(Arc::new(Service(Arc::clone(&self.state))))
            .into_axum_router()
            .layer(middleware::from_fn(authorize));
        self.server = Some(tokio::spawn(async move {
            axum::serve(listener, router).await.unwrap();
        }));
    }

    /// Stops to listen and drops all connections.
    pub(crate) async fn down(&mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
            let _ = server.await;
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Ids that it has, sorted.
    pub(crate) fn ids(&self) -> Vec<String> {
        let mut ids: Vec<_> = lock(&self.state.sandboxes).keys().cloned().collect();
        ids.sort();
        ids
    }

    pub(crate) fn creates(&self) -> usize {
        self.state.creates.load(Ordering::SeqCst)
    }

    pub(crate) fn destroys(&self) -> usize {
        self.state.destroys.load(Ordering::SeqCst)
    }

    pub(crate) fn sandbox(&self, id: &str) -> Option<FakeSandbox> {
        lock(&self.state.sandboxes).get(id).cloned()
    }

    /// Changes what it says of a sandbox.
    pub(crate) fn change(&self, id: &str, change: impl FnOnce(&mut FakeSandbox)) {
        change(lock(&self.state.sandboxes).get_mut(id).unwrap());
    }

    /// Forgets a sandbox.
    pub(crate) fn lose(&self, id: &str) {
        lock(&self.state.sandboxes).remove(id);
    }

    /// Has a sandbox that nobody asked for.
    pub(crate) fn plant(&self, id: &str, state: rpc::SandboxState) {
        let sandbox = FakeSandbox {
            state,
            reason: String::new(),
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

struct Service(Arc<State>);

impl State {
    fn require(&self, id: &str) -> Result<(), ConnectError> {
        match lock(&self.sandboxes).get_mut(id) {
            Some(sandbox) if sandbox.state == rpc::SandboxState::SANDBOX_STATE_RUNNING => {
                sandbox.last_active_ms = now_ms();
                Ok(())
            }
            Some(_) => Err(ConnectError::new(
                ErrorCode::FailedPrecondition,
                "it does not run",
            )),
            None => Err(ConnectError::new(
                ErrorCode::NotFound,
                format!("there is no sandbox `{id}`"),
            )),
        }
    }

    fn info(&self, id: &str) -> Option<rpc::SandboxInfo> {
        let sandboxes = lock(&self.sandboxes);
        let sandbox = sandboxes.get(id)?;
        Some(rpc::SandboxInfo {
            id: id.to_owned(),
            state: sandbox.state.into(),
            template: sandbox.request.template.clone(),
            vcpus: sandbox.request.vcpus,
            memory_mb: sandbox.request.memory_mb,
            timeout_sec: sandbox.request.timeout_sec,
            host_ip: "10.11.0.1".to_owned(),
            guest_ip: "169.254.0.21".to_owned(),
            created_unix_ms: now_ms(),
            last_active_unix_ms: sandbox.last_active_ms,
            reason: sandbox.reason.clone(),
            boot: rpc::BootTimes {
                prepared_ms: 1,
                vmm_started_ms: 2,
                kernel_ms: 3,
                init_ms: 4,
                envd_ms: 5,
                ..Default::default()
            }
            .into(),
            ..Default::default()
        })
    }
}

/// Removes a half-made sandbox when its create is given up.
struct Undo<'a>(&'a State, String, bool);

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if self.2 {
            lock(&self.0.sandboxes).remove(&self.1);
        }
    }
}

#[expect(
    refining_impl_trait_internal,
    reason = "the concrete types say more than the trait asks"
)]
impl HostAgentService for Service {
    async fn get_host(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, rpc::GetHostRequest>,
    ) -> ServiceResult<rpc::GetHostResponse> {
        Response::ok(rpc::GetHostResponse {
            accel: "tcg".to_owned(),
            cpu_count: 2,
            memory_total_mib: 8192,
            memory_available_mib: 8192,
            templates: vec![rpc::TemplateInfo {
                name: "minimal".to_owned(),
                vcpus: 1,
                memory_mb: 256,
                size_bytes: 1 << 29,
                created_unix_ms: 1_700_000_000_000,
                ..Default::default()
            }],
            ..Default::default()
        })
    }

    async fn create_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::CreateSandboxRequest>,
    ) -> ServiceResult<rpc::CreateSandboxResponse> {
        let request = request.to_owned_message();
        let id = request.id.clone();
        self.0.creates.fetch_add(1, Ordering::SeqCst);
        *lock(&self.0.egress) = request.egress.as_known();
        // As the real one: a caller that goes away does not stop it.
        let state = Arc::clone(&self.0);
        let task = tokio::spawn(async move { state.create(request).await });
        task.await.unwrap()?;
        let sandbox = self.0.info(&id).unwrap_or_default().into();
        Response::ok(rpc::CreateSandboxResponse {
            sandbox,
            ..Default::default()
        })
    }

    async fn destroy_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::DestroySandboxRequest>,
    ) -> ServiceResult<rpc::DestroySandboxResponse> {
        self.0.destroys.fetch_add(1, Ordering::SeqCst);
        self.0.destroy_gate.pass().await;
        if lock(&self.0.sandboxes).remove(request.id).is_none() {
            return Err(ConnectError::new(ErrorCode::NotFound, "no such sandbox"));
        }
        Response::ok(rpc::DestroySandboxResponse::default())
    }

    async fn list_sandboxes(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, rpc::ListSandboxesRequest>,
    ) -> ServiceResult<rpc::ListSandboxesResponse> {
        let ids: Vec<_> = lock(&self.0.sandboxes).keys().cloned().collect();
        let sandboxes = ids.iter().filter_map(|id| self.0.info(id)).collect();
        Response::ok(rpc::ListSandboxesResponse {
            sandboxes,
            ..Default::default()
        })
    }

    async fn ping_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::PingSandboxRequest>,
    ) -> ServiceResult<rpc::PingSandboxResponse> {
        self.0.require(request.id)?;
        Response::ok(rpc::PingSandboxResponse::default())
    }

    async fn get_metrics(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::GetMetricsRequest>,
    ) -> ServiceResult<rpc::GetMetricsResponse> {
        self.0.require(request.id)?;
        Response::ok(rpc::GetMetricsResponse {
            timestamp_unix_ms: 1_700_000_000_500,
            cpu_count: 2,
            cpu_used_pct: 12.5,
            mem_total_bytes: 1000,
            mem_used_bytes: 400,
            mem_cache_bytes: 100,
            disk_total_bytes: 5000,
            disk_used_bytes: 600,
            ..Default::default()
        })
    }

    async fn exec(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::ExecRequest>,
    ) -> ServiceResult<rpc::ExecResponse> {
        let request = request.to_owned_message();
        self.0.require(&request.id)?;
        if let Some(error) = lock(&self.0.exec_error).clone() {
            return Err(error);
        }
        Response::ok(processes::collect(request).await?)
    }

    async fn exec_stream(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::ExecStreamRequest>,
    ) -> ServiceResult<ServiceStream<rpc::ExecStreamResponse>> {
        let request = request.to_owned_message();
        self.0.require(&request.id)?;
        Response::stream_ok(self.0.processes.start(request)?)
    }

    async fn connect_process(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::ConnectProcessRequest>,
    ) -> ServiceResult<ServiceStream<rpc::ExecStreamResponse>> {
        let request = request.to_owned_message();
        self.0.require(&request.id)?;
        Response::stream_ok(self.0.processes.connect(&request)?)
    }

    async fn list_processes(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::ListProcessesRequest>,
    ) -> ServiceResult<rpc::ListProcessesResponse> {
        self.0.require(request.id)?;
        Response::ok(rpc::ListProcessesResponse {
            processes: self.0.processes.list(request.id),
            ..Default::default()
        })
    }

    async fn send_input(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::SendInputRequest>,
    ) -> ServiceResult<rpc::SendInputResponse> {
        let request = request.to_owned_message();
        self.0.require(&request.id)?;
        self.0.processes.input(request).await?;
        Response::ok(rpc::SendInputResponse::default())
    }

    async fn close_stdin(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::CloseStdinRequest>,
    ) -> ServiceResult<rpc::CloseStdinResponse> {
        self.0.processes.close_stdin(&request.to_owned_message())?;
        Response::ok(rpc::CloseStdinResponse::default())
    }

    async fn resize_pty(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::ResizePtyRequest>,
    ) -> ServiceResult<rpc::ResizePtyResponse> {
        self.0.processes.resize(&request.to_owned_message())?;
        Response::ok(rpc::ResizePtyResponse::default())
    }

    async fn signal_process(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::SignalProcessRequest>,
    ) -> ServiceResult<rpc::SignalProcessResponse> {
        let request = request.to_owned_message();
        self.0.require(&request.id)?;
        self.0.processes.signal(&request)?;
        Response::ok(rpc::SignalProcessResponse::default())
    }

    async fn write_file(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, rpc::WriteFileRequest>,
    ) -> ServiceResult<rpc::WriteFileResponse> {
        Err::<Response<rpc::WriteFileResponse>, _>(ConnectError::new(
            ErrorCode::Unimplemented,
            "not used",
        ))
    }

    async fn read_file(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, rpc::ReadFileRequest>,
    ) -> ServiceResult<rpc::ReadFileResponse> {
        Err::<Response<rpc::ReadFileResponse>, _>(ConnectError::new(
            ErrorCode::Unimplemented,
            "not used",
        ))
    }

    async fn write_file_stream(
        &self,
        _: RequestContext,
        mut requests: InboundStream<rpc::WriteFileStreamRequest>,
    ) -> ServiceResult<rpc::WriteFileStreamResponse> {
        let mut upload = Upload(&self.0, true);
        let mut path = None;
        let mut content = Vec::new();
        loop {
            self.0.upload_gate.pass().await;
            let Some(message) = requests.next().await else {
                break;
            };
            match &message?.view().part {
                Some(PartView::Meta(meta)) => {
                    self.0.require(meta.id)?;
                    if meta.path == "/dir" {
                        upload.1 = false;
                        return Err(ConnectError::new(
                            ErrorCode::InvalidArgument,
                            "`/dir` is a directory",
                        ));
                    }
                    path = Some(meta.path.to_owned());
                }
                Some(PartView::Chunk(chunk)) => {
                    assert!(chunk.len() <= 64 * 1024, "{}", chunk.len());
                    self.0.upload_bytes.fetch_add(chunk.len(), Ordering::SeqCst);
                    // Keeping hundreds of megabytes would hide what the control plane keeps.
                    if content.len() < 1 << 20 {
                        content.extend_from_slice(chunk);
                    }
                }
                None => return Err(ConnectError::invalid_argument("an empty message")),
            }
        }
        upload.1 = false;
        let path = path.ok_or_else(|| ConnectError::invalid_argument("no meta"))?;
        let size_bytes = content.len() as u64;
        lock(&self.0.files).insert(path, content);
        Response::ok(rpc::WriteFileStreamResponse {
            size_bytes,
            ..Default::default()
        })
    }

    async fn read_file_stream(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::ReadFileStreamRequest>,
    ) -> ServiceResult<ServiceStream<rpc::ReadFileStreamResponse>> {
        let request = request.to_owned_message();
        let meta = request.meta.into_option().unwrap_or_default();
        self.0.require(&meta.id)?;
        // `/zeros/N`: N bytes that are nowhere.
        let content = match meta.path.strip_prefix("/zeros/") {
            Some(length) => vec![0; length.parse().unwrap()],
            None => {
                let files = lock(&self.0.files);
                let found = files.get(&meta.path).cloned();
                found.ok_or_else(|| {
                    ConnectError::new(
                        ErrorCode::NotFound,
                        format!("there is no file `{}`", meta.path),
                    )
                })?
            }
        };
        let state = Arc::clone(&self.0);
        let pieces: Vec<_> = content.chunks(64 * 1024).map(<[u8]>::to_vec).collect();
        let stream =
            futures::stream::iter(pieces.into_iter().enumerate()).map(move |(n, chunk)| {
                if n > 0 && state.break_downloads.load(Ordering::SeqCst) {
                    return Err(ConnectError::new(
                        ErrorCode::Unavailable,
                        "the machine is gone",
                    ));
                }
                state
                    .download_bytes
                    .fetch_add(chunk.len(), Ordering::SeqCst);
                Ok(rpc::ReadFileStreamResponse {
                    chunk,
                    ..Default::default()
                })
            });
        Response::stream_ok(stream)
    }

    async fn list_dir(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::ListDirRequest>,
    ) -> ServiceResult<rpc::ListDirResponse> {
        let request = request.to_owned_message();
        let meta = request.meta.into_option().unwrap_or_default();
        self.0.require(&meta.id)?;
        let prefix = format!("{}/", meta.path);
        let mut names: Vec<_> = lock(&self.0.files)
            .keys()
            .filter(|path| path.starts_with(&prefix))
            .cloned()
            .collect();
        names.sort();
        Response::ok(rpc::ListDirResponse {
            entries: names.into_iter().map(entry).collect(),
            ..Default::default()
        })
    }

    async fn make_dir(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::MakeDirRequest>,
    ) -> ServiceResult<rpc::MakeDirResponse> {
        let request = request.to_owned_message();
        let meta = request.meta.into_option().unwrap_or_default();
        self.0.require(&meta.id)?;
        if meta.path == "/dir" {
            return Err(ConnectError::new(ErrorCode::AlreadyExists, "it exists"));
        }
        Response::ok(rpc::MakeDirResponse {
            entry: entry(meta.path).into(),
            ..Default::default()
        })
    }

    async fn remove_path(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::RemovePathRequest>,
    ) -> ServiceResult<rpc::RemovePathResponse> {
        let request = request.to_owned_message();
        let meta = request.meta.into_option().unwrap_or_default();
        self.0.require(&meta.id)?;
        lock(&self.0.files).remove(&meta.path);
        Response::ok(rpc::RemovePathResponse::default())
    }
}

impl State {
    async fn create(&self, request: rpc::CreateSandboxRequest) -> Result<(), ConnectError> {
        let id = request.id.clone();
        {
            let mut sandboxes = lock(&self.sandboxes);
            if sandboxes.contains_key(&id) {
                return Err(ConnectError::new(ErrorCode::AlreadyExists, "it exists"));
            }
            let sandbox = FakeSandbox {
                state: rpc::SandboxState::SANDBOX_STATE_STARTING,
                reason: String::new(),
                last_active_ms: now_ms(),
                request,
            };
            sandboxes.insert(id.clone(), sandbox);
        }
        let mut undo = Undo(self, id.clone(), true);
        let delay = *lock(&self.create_delay);
        tokio::time::sleep(delay).await;
        self.create_gate.pass().await;
        if let Some(error) = lock(&self.create_error).clone() {
            return Err(error);
        }
        undo.2 = false;
        match lock(&self.sandboxes).get_mut(&id) {
            Some(sandbox) => {
                sandbox.state = rpc::SandboxState::SANDBOX_STATE_RUNNING;
                Ok(())
            }
            None => Err(ConnectError::new(
                ErrorCode::Aborted,
                "it was destroyed while it was being created",
            )),
        }
    }
}

/// Counts an upload that is dropped before its end.
struct Upload<'a>(&'a State, bool);

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        if self.1 {
            self.0.broken_uploads.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn entry(path: String) -> filesystem::EntryInfo {
    filesystem::EntryInfo {
        name: path.rsplit('/').next().unwrap_or_default().to_owned(),
        r#type: filesystem::FileType::FILE_TYPE_FILE.into(),
        path,
        size: 7,
        mode: 0o644,
        permissions: "-rw-r--r--".to_owned(),
        owner: "root".to_owned(),
        group: "root".to_owned(),
        modified_time: buffa_types::google::protobuf::Timestamp {
            seconds: 1_700_000_000,
            nanos: 500_000_000,
            ..Default::default()
        }
        .into(),
        ..Default::default()
    }
}
