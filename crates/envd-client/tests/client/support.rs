//! A guest agent on a loopback port, and clients of it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use connectrpc::ConnectError;
use futures::future::BoxFuture;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use wrenn_envd::{
    process::registry::Registry,
    server::{self, Config},
    settings::{Init, Unnamed},
};
use wrenn_envd_client::{Dial, EnvdClient, Exec, ExecOutput, Stream};
use wrenn_proto::rpc::process::ProcessConfig;

pub(crate) const TOKEN: &str = "the-guest's-token";

/// Running guest agent. Dropping it kills its processes.
pub(crate) struct Guest {
    pub(crate) client: EnvdClient,
    pub(crate) dir: tempfile::TempDir,
    dials: Arc<AtomicUsize>,
    processes: Arc<Registry>,
}

impl Guest {
    pub(crate) async fn start() -> Self {
        Self::start_as("root").await
    }

    /// Starts a guest agent with a default user.
    pub(crate) async fn start_as(user: &str) -> Self {
        let config = Config {
            // Processes stay in the cgroup of the tests.
            cgroup_root: "/nonexistent".into(),
            ..Config::default()
        };
        let (app, launcher) = server::initial_state(&config);
        let processes = Arc::clone(&launcher.processes);
        let init = Init {
            access_token: Some(TOKEN.to_owned()),
            default_user: Some(user.to_owned()),
            ..Init::default()
        };
        app.settings.apply(init, Unnamed::Keep);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(server::serve(listener, app, launcher));
        let dials = Arc::<AtomicUsize>::default();
        let dial = CountingDial(address, Arc::clone(&dials));
        Self {
            client: EnvdClient::new(Arc::new(dial), TOKEN).unwrap(),
            dir: tempfile::tempdir().unwrap(),
            dials,
            processes,
        }
    }

    /// Returns the path of a file of the guest.
    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// Returns the number of connections that were opened.
    pub(crate) fn dials(&self) -> usize {
        self.dials.load(Ordering::SeqCst)
    }

    /// Runs a shell script.
    pub(crate) async fn sh(&self, script: &str) -> Result<ExecOutput, ConnectError> {
        self.client.exec(sh(script)).await
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        for process in self.processes.list() {
            // The id of a process is also the id of its group.
            let group = format!("-{}", process.pid);
            let kill = std::process::Command::new("kill")
                .args(["-9", "--", &group])
                .status();
            let _ = kill;
        }
    }
}

/// Returns a command that runs a shell script.
pub(crate) fn sh(script: &str) -> Exec {
    Exec {
        process: ProcessConfig {
            cmd: "sh".to_owned(),
            args: vec!["-c".to_owned(), script.to_owned()],
            ..Default::default()
        },
        ..Exec::default()
    }
}

struct CountingDial(SocketAddr, Arc<AtomicUsize>);

impl Dial for CountingDial {
    fn dial(&self) -> BoxFuture<'_, Result<Stream, ConnectError>> {
        Box::pin(async {
            self.1.fetch_add(1, Ordering::SeqCst);
            let stream = TcpStream::connect(self.0).await.unwrap();
            stream.set_nodelay(true).unwrap();
            Ok(Stream::new(stream))
        })
    }
}

/// Returns a client of a guest that gives one answer to every request and closes the connection.
pub(crate) async fn stub(answer: &'static [u8]) -> EnvdClient {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = Vec::new();
            while !request.windows(4).any(|window| window == b"\r\n\r\n") {
                if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
                    break;
                }
            }
            let _ = stream.write_all(answer).await;
            let _ = stream.shutdown().await;
            // The rest of the request is read, so that the answer is not lost in a reset.
            while let Ok(1..) = stream.read_buf(&mut request).await {}
        }
    });
    EnvdClient::over_tcp(address, TOKEN).unwrap()
}

/// Peak memory of this process, which contains the guest agent and the client, in KiB.
pub(crate) fn peak_memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Polls until a condition holds. Fails the test at the deadline.
pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds().await {
        assert!(Instant::now() < deadline, "timed out waiting until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
