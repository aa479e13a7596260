//! Agent in the test's process, on a private host, with fake supervisors, guests and templates.

use std::{
    collections::HashMap,
    fs,
    net::SocketAddr,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use connectrpc::{
    ConnectError,
    client::{ClientConfig, HttpClient},
};
use futures::future::BoxFuture;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::Child,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use wrenn_agent::{AgentConfig, AgentError, Deadlines, serve_with};
use wrenn_agent_tests::OneTemplate;
use wrenn_envd_client::{Dial, EnvdClient, Exec, ExecOutput, Stream};
use wrenn_proto::{
    guest, headers,
    rpc::{
        hostagent::v1::{self as pb, HostAgentServiceClient},
        process::ProcessConfig,
    },
    supervise::SupervisorSpec,
};

use crate::private_host;

pub(crate) type Client = HostAgentServiceClient<HttpClient>;

pub(crate) const TOKEN: &str = "the-agent's-token";

/// Runs a test on a private host.
pub(crate) fn on_private_host<F: Future<Output = ()>>(test: impl FnOnce() -> F) {
    private_host::enter();
    // The runtime's threads start after the thread changed its namespaces, so they share these.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(test());
    // A fake process that a test left behind would keep the test's pipes open.
    runtime.shutdown_timeout(Duration::from_secs(1));
}

/// Deadlines short enough for tests of missing events, and long enough for slow events.
pub(crate) fn deadlines() -> Deadlines {
    let mut deadlines = Deadlines::default();
    deadlines.machine = Duration::from_secs(10);
    deadlines.guest = Duration::from_secs(10);
    deadlines.stop = Duration::from_secs(2);
    deadlines
}

pub(crate) fn config(data_dir: &Path) -> AgentConfig {
    let exe = env!("CARGO_BIN_EXE_wrenn-fake-supervisor").into();
    AgentConfig {
        dns: vec![[10, 99, 0, 1].into()],
        ..wrenn_agent_tests::agent_config(data_dir, TOKEN, exe).expect("valid")
    }
}

pub(crate) struct TestAgent {
    pub(crate) client: Client,
    pub(crate) address: SocketAddr,
    pub(crate) data_dir: PathBuf,
    running: Option<Running>,
}

/// Process that an agent runs in.
enum Running {
    Here {
        shutdown: CancellationToken,
        serving: JoinHandle<Result<(), AgentError>>,
    },
    /// A separate process, which can be killed.
    Child(Child),
}

impl TestAgent {
    pub(crate) async fn start(data_dir: &Path) -> Self {
        Self::start_with(config(data_dir), deadlines()).await
    }

    pub(crate) async fn start_with(config: AgentConfig, deadlines: Deadlines) -> Self {
        let data_dir = config.data_dir.clone();
        let templates = OneTemplate::new(&data_dir);
        let shutdown = CancellationToken::new();
        let (ready, address) = tokio::sync::oneshot::channel();
        let serve = serve_with(
            config,
            Arc::new(templates),
            deadlines,
            move |address| ready.send(address).expect("waited for"),
            shutdown.clone(),
        );
        let serving = tokio::spawn(serve);
        let address = address.await.expect("the agent starts");
        Self {
            client: client(address, TOKEN),
            address,
            data_dir,
            running: Some(Running::Here { shutdown, serving }),
        }
    }

    /// Returns the error of an agent that does not start.
    pub(crate) async fn refusal(data_dir: &Path) -> String {
        Self::refusal_of(config(data_dir)).await
    }

    /// Same as [`refusal`](Self::refusal), with other settings.
    pub(crate) async fn refusal_of(config: AgentConfig) -> String {
        let templates = Arc::new(OneTemplate::new(&config.data_dir));
        let shutdown = CancellationToken::new();
        let ready = |_| panic!("the agent must not start");
        let served = serve_with(config, templates, deadlines(), ready, shutdown);
        served.await.expect_err("an error").to_string()
    }

    /// Starts an agent as a separate process.
    pub(crate) async fn start_child(data_dir: &Path) -> Self {
        Self::start_child_with(data_dir, "").await
    }

    /// Starts an agent as a separate process that dies at a failpoint (see
    /// `wrenn_sys::failpoint`).
    pub(crate) async fn start_child_with(data_dir: &Path, failpoint: &str) -> Self {
        let mut child = spawn_child(data_dir, failpoint);
        let stdout = child.stdout.take().expect("piped");
        let mut line = String::new();
        let mut reader = tokio::io::BufReader::new(stdout);
        reader.read_line(&mut line).await.expect("read");
        let address = line.trim().parse().expect("an address");
        Self {
            client: client(address, TOKEN),
            address,
            data_dir: data_dir.to_owned(),
            running: Some(Running::Child(child)),
        }
    }

    /// Starts an agent that dies at a failpoint of its start, and waits for that.
    pub(crate) async fn dies_at_start(data_dir: &Path, failpoint: &str) {
        died(&mut spawn_child(data_dir, failpoint), failpoint).await;
    }

    /// Waits until the agent has died at its failpoint.
    pub(crate) async fn dies(mut self, failpoint: &str) {
        let Some(Running::Child(mut child)) = self.running.take() else {
            panic!("only an agent in a separate process has a failpoint");
        };
        died(&mut child, failpoint).await;
    }

    /// Kills the agent as `kill -9` does.
    pub(crate) async fn kill(mut self) {
        let Some(Running::Child(mut child)) = self.running.take() else {
            panic!("only an agent in a separate process can be killed");
        };
        child.kill().await.expect("killed");
    }

    /// Shuts the agent down in order, as SIGTERM does.
    pub(crate) async fn stop(mut self) {
        let Some(Running::Here { shutdown, serving }) = self.running.take() else {
            panic!("only an agent in this process can be shut down");
        };
        shutdown.cancel();
        serving.await.expect("no panic").expect("no error");
    }

    pub(crate) async fn create(&self, id: &str) -> Result<pb::SandboxInfo, ConnectError> {
        self.create_with(request(id)).await
    }

    pub(crate) async fn create_with(
        &self,
        request: pb::CreateSandboxRequest,
    ) -> Result<pb::SandboxInfo, ConnectError> {
        let answer = self.client.create_sandbox(request).await?;
        Ok(answer
            .into_owned()
            .sandbox
            .into_option()
            .expect("a sandbox"))
    }

    pub(crate) async fn destroy(&self, id: &str) -> Result<(), ConnectError> {
        let request = pb::DestroySandboxRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.client.destroy_sandbox(request).await.map(drop)
    }

    pub(crate) async fn pause(&self, id: &str) -> Result<(), ConnectError> {
        self.pause_with(id, pb::PauseEffort::default()).await
    }

    pub(crate) async fn pause_with(
        &self,
        id: &str,
        effort: pb::PauseEffort,
    ) -> Result<(), ConnectError> {
        let request = pb::PauseSandboxRequest {
            id: id.to_owned(),
            effort: effort.into(),
            ..Default::default()
        };
        self.client.pause_sandbox(request).await.map(drop)
    }

    pub(crate) async fn resume(&self, id: &str) -> Result<(), ConnectError> {
        let request = pb::ResumeSandboxRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.client.resume_sandbox(request).await.map(drop)
    }

    pub(crate) async fn snapshot(&self, id: &str, name: &str) -> Result<(), ConnectError> {
        let request = pb::CreateSnapshotRequest {
            id: id.to_owned(),
            name: name.to_owned(),
            ..Default::default()
        };
        self.client.create_snapshot(request).await.map(drop)
    }

    pub(crate) async fn list(&self) -> Vec<pb::SandboxInfo> {
        let request = pb::ListSandboxesRequest::default();
        let answer = self.client.list_sandboxes(request).await;
        answer.expect("a list").into_owned().sandboxes
    }

    pub(crate) async fn find(&self, id: &str) -> Option<pb::SandboxInfo> {
        self.list().await.into_iter().find(|s| s.id == id)
    }

    /// Waits until a sandbox is in a state.
    pub(crate) async fn wait_for(&self, id: &str, state: pb::SandboxState) -> pb::SandboxInfo {
        let what = format!("{id} in {state:?}");
        until(&what, async || {
            let found = self.find(id).await;
            found.filter(|s| s.state.as_known() == Some(state))
        })
        .await
    }

    /// Runs a shell script in the guest, through a tunnel, as a control plane does.
    pub(crate) async fn sh(&self, id: &str, script: &str) -> Result<ExecOutput, ConnectError> {
        let exec = Exec {
            process: ProcessConfig {
                cmd: "sh".to_owned(),
                args: vec!["-c".to_owned(), script.to_owned()],
                ..Default::default()
            },
            ..Exec::default()
        };
        self.guest(id).exec(exec).await
    }

    /// Returns a client of a guest, with connections of its own.
    pub(crate) fn guest(&self, id: &str) -> EnvdClient {
        let spec = fs::read(self.sandbox_dir(id).join("spec.json")).unwrap_or_default();
        let spec = serde_json::from_slice::<SupervisorSpec>(&spec);
        let token = spec.map(|spec| spec.envd_token).unwrap_or_default();
        let dial = TunnelDial {
            agent: self.address,
            id: id.to_owned(),
        };
        EnvdClient::new(Arc::new(dial), &token).expect("a token")
    }

    pub(crate) fn sandbox_dir(&self, id: &str) -> PathBuf {
        self.data_dir.join("sandboxes").join(id)
    }

    pub(crate) fn spec(&self, id: &str) -> SupervisorSpec {
        let text = fs::read(self.sandbox_dir(id).join("spec.json")).expect("a spec");
        serde_json::from_slice(&text).expect("a spec")
    }

    /// Process ID of a sandbox's fake supervisor.
    pub(crate) fn supervisor_pid(&self, id: &str) -> i32 {
        *supervisors_below(&self.sandbox_dir(id))
            .first()
            .expect("a supervisor")
    }

    /// Drops all connections, so that later counts do not include connections of the test itself.
    pub(crate) fn renew_client(&mut self) {
        self.client = client(self.address, TOKEN);
    }

    /// Process ID of a sandbox's fake VMM. The VMM writes it once it has joined its cgroups, which
    /// may be after the create.
    pub(crate) fn machine_pid(&self, id: &str) -> i32 {
        let file = self.sandbox_dir(id).join("machine.pid");
        let began = Instant::now();
        while !file.exists() && began.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let text = fs::read_to_string(file);
        text.expect("a machine").trim().parse().expect("a pid")
    }
}

/// Kills the fake processes of a failed test. Supervisors outlive their agent, and no other agent
/// adopts them here.
impl Drop for TestAgent {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for sandbox_dir in fs::read_dir(self.data_dir.join("sandboxes"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let machine = fs::read_to_string(sandbox_dir.path().join("machine.pid"));
            let machine = machine.ok().and_then(|pid| pid.trim().parse().ok());
            for pid in supervisors_below(&sandbox_dir.path())
                .into_iter()
                .chain(machine)
            {
                let pid = nix::unistd::Pid::from_raw(pid);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
    }
}

fn spawn_child(data_dir: &Path, failpoint: &str) -> Child {
    tokio::process::Command::new(env!("CARGO_BIN_EXE_wrenn-fake-supervisor"))
        .arg("agent")
        .arg(data_dir)
        .arg(TOKEN)
        .env(wrenn_sys::failpoint::VARIABLE, failpoint)
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("the fake starts")
}

async fn died(agent: &mut Child, failpoint: &str) {
    let end = tokio::time::timeout(Duration::from_secs(30), agent.wait()).await;
    let status = end.unwrap_or_else(|_| panic!("{failpoint}: not reached"));
    let signal = status.expect("a child").signal();
    assert_eq!(signal, Some(nix::libc::SIGKILL), "{failpoint}");
}

/// Process IDs of the fake supervisors of a directory.
fn supervisors_below(sandbox_dir: &Path) -> Vec<i32> {
    let is_it = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        let suffix = format!("\0supervise\0--dir\0{}\0", sandbox_dir.display());
        line.ends_with(&suffix)
    };
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.filter(is_it).collect()
}

pub(crate) fn client(address: SocketAddr, token: &str) -> Client {
    HostAgentServiceClient::new(HttpClient::plaintext(), client_config(address, token))
}

/// Client of the control plane of an installation.
pub(crate) fn client_of(agent: &TestAgent, installation: &str) -> Client {
    let config = client_config(agent.address, TOKEN);
    let config = config.with_default_header(headers::INSTALLATION, installation);
    HostAgentServiceClient::new(HttpClient::plaintext(), config)
}

fn client_config(address: SocketAddr, token: &str) -> ClientConfig {
    ClientConfig::new(format!("http://{address}").parse().expect("a URI"))
        .with_default_max_message_size(256 * 1024 * 1024)
        .with_default_header("authorization", format!("Bearer {token}"))
}

pub(crate) fn request(id: &str) -> pb::CreateSandboxRequest {
    pb::CreateSandboxRequest {
        id: id.to_owned(),
        template: "minimal".to_owned(),
        vcpus: 1,
        memory_mb: 256,
        timeout_sec: 300,
        ..Default::default()
    }
}

/// Returns a create request whose fake supervisor or guest has a fault.
pub(crate) fn faulty(id: &str, fault: &str) -> pb::CreateSandboxRequest {
    pb::CreateSandboxRequest {
        envs: HashMap::from([("FAKE".to_owned(), fault.to_owned())])
            .into_iter()
            .collect(),
        ..request(id)
    }
}

/// Opens tunnels to the guest agent of one sandbox.
struct TunnelDial {
    agent: SocketAddr,
    id: String,
}

impl Dial for TunnelDial {
    fn dial(&self) -> BoxFuture<'_, Result<Stream, ConnectError>> {
        Box::pin(async {
            let path = format!("/tunnel/{}/{}", self.id, guest::ENVD_PORT);
            let (head, mut connection) = ask_tunnel(self.agent, &path, TOKEN)
                .await
                .map_err(|error| ConnectError::unavailable(error.to_string()))?;
            if head.starts_with("HTTP/1.1 101") {
                return Ok(Stream::new(connection));
            }
            let body = read_body(&head, &mut connection).await;
            let message = body["message"].to_string();
            Err(match body["code"].as_str() {
                Some("not_found") => ConnectError::not_found(message),
                Some("failed_precondition") => ConnectError::failed_precondition(message),
                _ => ConnectError::unavailable(message),
            })
        })
    }
}

/// Requests a tunnel. Returns the head of the response and the connection behind it.
pub(crate) async fn ask_tunnel(
    agent: SocketAddr,
    path: &str,
    token: &str,
) -> std::io::Result<(String, TcpStream)> {
    let mut connection = TcpStream::connect(agent).await?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: agent\r\nAuthorization: Bearer {token}\r\n\
         Connection: upgrade\r\nUpgrade: wrenn-tunnel\r\n\r\n"
    );
    connection.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(connection.read_u8().await?);
    }
    Ok((String::from_utf8(head).expect("text"), connection))
}

/// Reads the JSON body of a response.
pub(crate) async fn read_body(head: &str, connection: &mut TcpStream) -> serde_json::Value {
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let length = length.expect("a length").parse().expect("a number");
    let mut body = vec![0; length];
    connection.read_exact(&mut body).await.expect("a body");
    serde_json::from_slice(&body).expect("JSON")
}

/// Polls until there is a value, for at most half a minute.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "timed out waiting for: {what}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// True if a process is alive.
pub(crate) fn is_alive(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status
        .rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

pub(crate) fn kill_9(pid: i32) {
    signal(pid, nix::sys::signal::Signal::SIGKILL);
}

pub(crate) fn signal(pid: i32, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, signal).expect("the process is alive");
}
