//! Server that answers like Firecracker's API, or fails in a chosen way.

use std::{
    collections::HashMap,
    fs, io,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener as StdListener, UnixStream as StdStream},
    },
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::Notify,
    task::JoinHandle,
    time::sleep,
};
use wrenn_jail::SocketDir;
use wrenn_model::MachineSize;
use wrenn_proto::{
    machine::{MachineProfile, VmmKind},
    supervise::{Accel, DiskRate},
};
use wrenn_vmm::{
    ControlError, MachineConfig, Start,
    firecracker::{Channels, Client, Control, Deadlines, Pages, SnapshotFiles},
};

/// Path of the log in these tests.
const LOG_PATH: &str = "/test/log";
/// Path of the metrics in these tests.
const METRICS_PATH: &str = "/test/metrics";
/// Path of the memory in these tests, if it is mapped.
pub(crate) const MAPPED_PATH: &str = "/test/memory";

/// Deadline of the calls that are to time out.
pub(crate) const SHORT: Duration = Duration::from_secs(1);

/// Handler of a request: takes the body, returns status and body of the answer.
type Handler = Arc<dyn Fn(&Value) -> (u16, String) + Send + Sync>;

/// Reaction to a request.
#[derive(Clone)]
pub(crate) enum Reaction {
    /// Answers.
    Answer(u16, String),
    /// Runs a function, and answers with its result.
    Run(Handler),
    /// Runs a function, and answers with its result once it is notified.
    Held(Handler, Arc<Notify>),
    /// Answers after a time.
    Slow(Duration),
    /// Keeps the connection, and never answers.
    Silent,
    /// Sends these bytes, and closes the connection.
    Raw(Vec<u8>),
    /// Sends one byte of an answer at a time, without end.
    Drip,
    /// Sends a head, and then a body without end.
    Endless,
}

impl Reaction {
    /// Answers with an error like Firecracker's.
    pub(crate) fn fault(status: u16, reason: &str) -> Self {
        Self::Answer(status, json!({ "fault_message": reason }).to_string())
    }

    /// Runs a function, and answers with success.
    pub(crate) fn run(function: impl Fn(&Value) + Send + Sync + 'static) -> Self {
        Self::Run(succeeding(function))
    }

    /// Runs a function, and answers with success once it is notified.
    pub(crate) fn held(
        function: impl Fn(&Value) + Send + Sync + 'static,
        notify: Arc<Notify>,
    ) -> Self {
        Self::Held(succeeding(function), notify)
    }
}

fn succeeding(function: impl Fn(&Value) + Send + Sync + 'static) -> Handler {
    Arc::new(move |body| {
        function(body);
        (204, String::new())
    })
}

#[derive(Default)]
struct Shared {
    reactions: Mutex<HashMap<String, Reaction>>,
    requests: Mutex<Vec<(String, Value)>>,
}

/// Simulated Firecracker process: the server of its API, and its files.
pub(crate) struct FakeFirecracker {
    dir: TempDir,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

impl Drop for FakeFirecracker {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl FakeFirecracker {
    /// Starts a server of version `version`, and returns the channels to it.
    pub(crate) fn start(version: &str, pages: Option<Pages>) -> (Self, Channels) {
        let (fake, channels) = Self::prepare(version, pages);
        let listener = StdListener::bind(fake.api_path()).expect("bound");
        (fake.serving(listener), channels)
    }

    /// Prepares a server that does not listen yet.
    pub(crate) fn prepare(version: &str, pages: Option<Pages>) -> (Self, Channels) {
        let dir = tempfile::tempdir().expect("a directory");
        let uid = rustix::process::getuid().as_raw();
        let opened = fs::File::open(dir.path()).expect("opens");
        let sockets = SocketDir::in_directory(opened.into(), uid).expect("created");
        let channels = Channels {
            client: Client::new(sockets),
            files: SnapshotFiles::create(dir.path(), uid).expect("created"),
            log_path: LOG_PATH.to_owned(),
            metrics_path: METRICS_PATH.to_owned(),
            pages,
        };
        let fake = Self {
            dir,
            shared: Arc::default(),
            server: tokio::spawn(async {}),
        };
        let info = json!({
            "id": "sb-0123abcd",
            "state": "Not started",
            "vmm_version": version,
            "app_name": "Firecracker",
        });
        fake.react("GET /", Reaction::Answer(200, info.to_string()));
        let version = json!({ "firecracker_version": version });
        fake.react("GET /version", Reaction::Answer(200, version.to_string()));
        (fake, channels)
    }

    /// Serves the API on a socket.
    pub(crate) fn serving(mut self, listener: StdListener) -> Self {
        listener.set_nonblocking(true).expect("possible");
        let listener = UnixListener::from_std(listener).expect("registered");
        let shared = Arc::clone(&self.shared);
        self.server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    // The client may close the connection at any time.
                    let _ = serve(stream, &shared).await;
                });
            }
        });
        self
    }

    /// Path of the API socket.
    pub(crate) fn api_path(&self) -> PathBuf {
        self.dir.path().join("own/api.sock")
    }

    /// Path of the socket that takes the userfaultfd.
    pub(crate) fn pages_path(&self) -> PathBuf {
        self.dir.path().join("pages.sock")
    }

    /// Sets the reaction to all later requests of a call. By default, the answer is 204.
    pub(crate) fn react(&self, call: &str, reaction: Reaction) {
        let mut reactions = self.shared.reactions.lock().expect("not poisoned");
        reactions.insert(call.to_owned(), reaction);
    }

    /// Returns the calls so far, with their bodies.
    pub(crate) fn requests(&self) -> Vec<(String, Value)> {
        self.shared.requests.lock().expect("not poisoned").clone()
    }

    /// Returns the calls so far.
    pub(crate) fn calls(&self) -> Vec<String> {
        self.requests().into_iter().map(|(call, _)| call).collect()
    }
}

async fn serve(mut stream: UnixStream, shared: &Shared) -> io::Result<()> {
    let Some((call, body)) = read_request(&mut stream).await? else {
        return Ok(());
    };
    let body: Value = match body.is_empty() {
        true => Value::Null,
        false => serde_json::from_slice(&body)?,
    };
    let recorded = (call.clone(), body.clone());
    shared.requests.lock().expect("not poisoned").push(recorded);
    let reaction = shared
        .reactions
        .lock()
        .expect("not poisoned")
        .get(&call)
        .cloned();
    let success = || (204, String::new());
    let (status, text) = match reaction {
        None => success(),
        Some(Reaction::Answer(status, text)) => (status, text),
        Some(Reaction::Run(handler)) => handler(&body),
        Some(Reaction::Held(handler, notify)) => {
            let answer = handler(&body);
            notify.notified().await;
            answer
        }
        Some(Reaction::Slow(time)) => {
            sleep(time).await;
            success()
        }
        Some(Reaction::Silent) => return std::future::pending().await,
        Some(Reaction::Raw(bytes)) => {
            stream.write_all(&bytes).await?;
            return stream.shutdown().await;
        }
        Some(Reaction::Drip) => {
            let head = b"HTTP/1.1 204 \r\nX: ";
            for byte in head.iter().chain(std::iter::repeat(&b'x')) {
                stream.write_all(&[*byte]).await?;
                sleep(Duration::from_millis(10)).await;
            }
            return Ok(());
        }
        Some(Reaction::Endless) => {
            let head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n";
            stream.write_all(head).await?;
            loop {
                stream.write_all(&[b'x'; 4096]).await?;
            }
        }
    };
    stream.write_all(answer(status, &text).as_bytes()).await
}

/// Returns an answer like that of Firecracker's HTTP server.
pub(crate) fn answer(status: u16, body: &str) -> String {
    let length = match status {
        204 => String::new(),
        _ => format!("Content-Length: {}\r\n", body.len()),
    };
    format!(
        "HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
         Content-Type: application/json\r\n{length}\r\n{body}"
    )
}

/// Reads a request. Returns its method with its path, and its body. `None` if the client has
/// closed the connection without one.
async fn read_request(stream: &mut UnixStream) -> io::Result<Option<(String, Vec<u8>)>> {
    let mut received = Vec::new();
    loop {
        let end = received.windows(4).position(|part| part == b"\r\n\r\n");
        if let Some(end) = end {
            let head = String::from_utf8_lossy(&received[..end]).into_owned();
            let mut body = received.split_off(end + 4);
            let wanted = content_length(&head);
            let so_far = body.len();
            body.resize(wanted.max(so_far), 0);
            stream.read_exact(&mut body[so_far..]).await?;
            assert_headers(&head);
            let line = head.lines().next().unwrap_or_default();
            let call = line.trim_end_matches(" HTTP/1.1").to_owned();
            return Ok(Some((call, body)));
        }
        if stream.read_buf(&mut received).await? == 0 {
            return Ok(None);
        }
    }
}

fn content_length(head: &str) -> usize {
    let head = head.to_lowercase();
    let value = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"));
    value.map_or(0, |value| value.trim().parse().expect("a number"))
}

/// Checks the headers that Firecracker's documentation gives in its examples.
fn assert_headers(head: &str) {
    let head = head.to_lowercase();
    for header in ["accept: application/json", "content-type: application/json"] {
        assert!(head.contains(header), "{header} in {head}");
    }
    assert!(!head.contains("transfer-encoding"), "{head}");
}

/// Deadlines for tests of calls that time out.
pub(crate) fn short_deadlines() -> Deadlines {
    Deadlines {
        start: SHORT,
        configure: SHORT,
        cpus: SHORT,
        load: SHORT,
        create: SHORT,
        per_mib: Duration::ZERO,
    }
}

/// Configuration of a VM of 512 MiB.
pub(crate) fn config(start: Start) -> MachineConfig {
    MachineConfig {
        name: "sb-0123abcd".into(),
        accel: Accel::Kvm,
        cpu: "host".parse().expect("valid"),
        machine: MachineProfile::current(VmmKind::Firecracker),
        size: MachineSize {
            vcpus: 2,
            memory_mib: 512,
            disk_mib: 5120,
        },
        kernel: "/host/kernel".into(),
        initrd: "/host/initrd".into(),
        kernel_args: "console=ttyS0 quiet clocksource=kvm-clock".into(),
        disk: "/host/disk".into(),
        disk_layers: vec![],
        base_disk: "/host/base".into(),
        work_dir: "/host/work".into(),
        metadata: None,
        guest_mac: "02:FC:00:00:00:05".into(),
        netns: "/run/netns/test".into(),
        cgroups: vec![],
        uid: 1,
        disk_rate: DiskRate::default(),
        start,
    }
}

/// Returns a configuration with all that is optional.
pub(crate) fn full_config(start: Start) -> MachineConfig {
    MachineConfig {
        metadata: Some(json!({ "instanceID": "sb-0123abcd", "address": "" })),
        disk_rate: DiskRate {
            bytes_per_sec: 209_715_200,
            ops_per_sec: 5000,
        },
        ..config(start)
    }
}

/// Attaches to a simulated process of the newest version that waits for a snapshot to load.
pub(crate) async fn attach_for_load(
    pages: Pages,
    deadlines: Deadlines,
) -> (FakeFirecracker, Control) {
    let (fake, channels) = FakeFirecracker::start("1.16.1", Some(pages));
    let control = Control::attach(channels, &config(Start::Restore), deadlines).await;
    (fake, control.expect("attached"))
}

/// Returns a socket for the page server, and its other end.
pub(crate) fn pager() -> (Pages, StdStream) {
    let (ours, theirs) = StdStream::pair().expect("a pair");
    (Pages::Served(theirs.into()), ours)
}

/// Returns a file with a device state.
pub(crate) fn state_file() -> OwnedFd {
    use std::io::{Seek as _, Write as _};
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(b"device state").expect("written");
    file.rewind().expect("possible");
    file.into()
}

/// Returns an empty file, and a way to read it afterwards.
pub(crate) fn empty_file() -> (OwnedFd, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().expect("a file");
    (file.reopen().expect("open").into(), file)
}

/// Returns the reason of a rejection, after checking the command.
pub(crate) fn rejection(error: &ControlError, call: &str) -> String {
    match error {
        ControlError::Rejected { command, reason } if *command == call => reason.clone(),
        other => panic!("{other:?} is not a rejection of {call}"),
    }
}
