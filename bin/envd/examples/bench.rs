//! Benchmark of the guest agent against the same operations without it: `bench ENVD`, where `ENVD`
//! is the path of the agent executable.
//!
//! Prints one JSON object; times are medians. Runs in its own network namespace, so it needs root.

use std::{
    error::Error,
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

use connectrpc::client::{ClientConfig, HttpClient};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use wrenn_proto::rpc::{
    filesystem::{FilesystemClient, ListDirRequest},
    process::{__buffa::oneof::process_event::Event, ProcessClient, ProcessConfig, StartRequest},
};

type Outcome<T> = Result<T, Box<dyn Error>>;

const PORT: u16 = 49983;
const RUNS: usize = 300;
const TRANSFERS: usize = 9;
const TRANSFER_BYTES: usize = 64 << 20;
const ENTRIES: usize = 10_000;
const STREAMS: usize = 1_000;
/// Maximum resident memory of an idle agent, KiB.
const MOST_IDLE_KIB: u64 = 8 * 1024;
const IDLE: Duration = Duration::from_secs(10);

fn main() -> Outcome<()> {
    let program = std::env::args().nth(1).ok_or("usage: bench ENVD")?;
    // Must run before a second thread exists, because a namespace belongs to a thread.
    unshare(CloneFlags::CLONE_NEWNET)?;
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()?;
    if !up.success() {
        return Err("failed to set the loopback device up".into());
    }
    let agent = Agent::start(&program)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let report = runtime.block_on(measure(&agent, &program))?;
    println!("{report:#}");
    Ok(())
}

/// Agent under test. Dropping it kills the agent.
struct Agent(Child);

impl Agent {
    fn start(program: &str) -> Outcome<Self> {
        // These settings point to no usable cgroup root and no metadata service.
        let quiet = ["--cgroup-root", "/proc", "--metadata", "127.0.0.1:1"];
        let agent = Self(Command::new(program).args(quiet).spawn()?);
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(address()).is_err() {
            if Instant::now() > deadline {
                return Err("timed out waiting for the agent to listen".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(agent)
    }

    /// Resident memory, KiB.
    fn resident_kib(&self) -> Outcome<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let word = line.and_then(|rest| rest.split_whitespace().next());
        Ok(word.ok_or("no VmRSS")?.parse()?)
    }

    /// CPU time of the agent's main thread.
    fn busy(&self) -> Outcome<Duration> {
        let text = fs::read_to_string(format!("/proc/{}/schedstat", self.0.id()))?;
        let word = text.split_whitespace().next().ok_or("no schedstat")?;
        Ok(Duration::from_nanos(word.parse()?))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // The agent may already have exited.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, PORT).into()
}

async fn measure(agent: &Agent, program: &str) -> Outcome<Value> {
    let before = agent.busy()?;
    tokio::time::sleep(IDLE).await;
    let idle_us = (agent.busy()? - before).as_micros() / u128::from(IDLE.as_secs());
    let idle_kib = agent.resident_kib()?;
    let dir = tempfile::tempdir()?;
    let config = ClientConfig::new(format!("http://{}", address()).parse()?)
        .with_default_max_message_size(64 << 20);
    let transport = HttpClient::plaintext();
    let process = ProcessClient::new(transport.clone(), config.clone());
    let files = FilesystemClient::new(transport, config);
    Ok(json!({
        "binary_bytes": fs::metadata(program)?.len(),
        "idle_kib": idle_kib,
        "idle_within_limit": idle_kib <= MOST_IDLE_KIB,
        "idle_cpu_us_per_s": json!({ "agent": u64::try_from(idle_us)?, "bare": tables_us()? }),
        "process_us": processes(&process).await?,
        "transfer_mb_per_s": transfers(dir.path()).await?,
        "list_ms": list(&files, dir.path()).await?,
        "stream_kib": streams(agent)?,
        "used_kib": agent.resident_kib()?,
        "prepared_kib": prepared(agent)?,
    }))
}

/// Returns the time to read the socket tables, as the agent does once per second, in microseconds.
fn tables_us() -> Outcome<u64> {
    let mut times = Vec::new();
    for _ in 0..RUNS {
        let begin = Instant::now();
        fs::read("/proc/net/tcp")?;
        fs::read("/proc/net/tcp6")?;
        times.push(begin.elapsed());
    }
    Ok(u64::try_from(median(times).as_micros())?)
}

/// Measures the time from start to exit of a process, in microseconds.
async fn processes(client: &ProcessClient<HttpClient>) -> Outcome<Value> {
    let mut agent = Vec::new();
    let mut bare = Vec::new();
    for _ in 0..RUNS {
        let begin = Instant::now();
        let request = StartRequest {
            process: ProcessConfig {
                cmd: "/bin/true".to_owned(),
                ..Default::default()
            }
            .into(),
            stdin: Some(false),
            ..Default::default()
        };
        let mut events = client.start(request).await?;
        let mut ended = false;
        while let Some(message) = events.message().await? {
            let message = message.to_owned_message();
            let event = message
                .event
                .as_option()
                .and_then(|event| event.event.as_ref());
            ended |= matches!(event, Some(Event::End(_)));
        }
        if !ended {
            return Err("a process stream ended without an end event".into());
        }
        agent.push(begin.elapsed());
        let begin = Instant::now();
        Command::new("/bin/true").output()?;
        bare.push(begin.elapsed());
    }
    let us = |times: Vec<Duration>| u64::try_from(median(times).as_micros());
    Ok(json!({ "agent": us(agent)?, "bare": us(bare)? }))
}

/// Measures uploads and downloads, in millions of bytes per second.
async fn transfers(dir: &Path) -> Outcome<Value> {
    let (here, there) = (dir.join("bare"), dir.join("agent"));
    let content: Vec<u8> = (0..251).cycle().take(TRANSFER_BYTES).collect();
    let client = reqwest::Client::new();
    let url = format!("http://{}/files?path={}", address(), there.display());
    let (mut up, mut down, mut write, mut read) = (vec![], vec![], vec![], vec![]);
    for _ in 0..TRANSFERS {
        let body = content.clone();
        let begin = Instant::now();
        let kind = ("content-type", "application/octet-stream");
        let sent = client
            .post(&url)
            .header(kind.0, kind.1)
            .body(body)
            .send()
            .await?;
        sent.error_for_status()?;
        up.push(begin.elapsed());
        let begin = Instant::now();
        let got = client.get(&url).send().await?.bytes().await?;
        down.push(begin.elapsed());
        if got != content {
            return Err("the downloaded file differs from the uploaded file".into());
        }
        let begin = Instant::now();
        fs::File::create(&here)?.write_all(&content)?;
        write.push(begin.elapsed());
        let begin = Instant::now();
        let mut all = Vec::new();
        fs::File::open(&here)?.read_to_end(&mut all)?;
        read.push(begin.elapsed());
    }
    let rate = |times: Vec<Duration>| {
        let mb = TRANSFER_BYTES as f64 / 1e6;
        (mb / median(times).as_secs_f64()).round()
    };
    Ok(json!({
        "upload": rate(up), "write": rate(write), "download": rate(down), "read": rate(read),
    }))
}

/// Measures the listing of a large directory, in milliseconds.
async fn list(client: &FilesystemClient<HttpClient>, dir: &Path) -> Outcome<Value> {
    let dir = dir.join("many");
    fs::create_dir(&dir)?;
    for number in 0..ENTRIES {
        fs::write(dir.join(format!("file-{number}")), "")?;
    }
    let (mut agent, mut bare) = (vec![], vec![]);
    for _ in 0..TRANSFERS {
        let begin = Instant::now();
        let request = ListDirRequest {
            path: dir.display().to_string(),
            ..Default::default()
        };
        let entries = client.list_dir(request).await?.into_owned().entries;
        agent.push(begin.elapsed());
        if entries.len() != ENTRIES {
            return Err("the listing is incomplete".into());
        }
        let begin = Instant::now();
        for entry in fs::read_dir(&dir)? {
            fs::symlink_metadata(entry?.path())?;
        }
        bare.push(begin.elapsed());
    }
    let ms = |times: Vec<Duration>| (median(times).as_secs_f64() * 1e5).round() / 100.0;
    Ok(json!({ "agent": ms(agent), "bare": ms(bare) }))
}

/// Measures the memory of a waiting stream, KiB: many clients follow one process that prints
/// nothing.
fn streams(agent: &Agent) -> Outcome<f64> {
    let _quiet = stream(
        "Start",
        r#"{"process":{"cmd":"/bin/sleep","args":["1000"]},"tag":"quiet","stdin":false}"#,
    )?;
    let before = agent.resident_kib()?;
    let mut all = Vec::new();
    for _ in 0..STREAMS {
        all.push(stream("Connect", r#"{"process":{"tag":"quiet"}}"#)?);
    }
    let grown = agent.resident_kib()?.saturating_sub(before);
    let end = r#"{"process":{"tag":"quiet"},"signal":"SIGNAL_SIGKILL"}"#;
    post("/process.Process/SendSignal", end)?;
    Ok((grown as f64 / STREAMS as f64 * 10.0).round() / 10.0)
}

/// Measures resident memory after the agent prepared for a snapshot, KiB.
fn prepared(agent: &Agent) -> Outcome<u64> {
    post(
        "/snapshot/prepare",
        r#"{"snapshotId":"bench","keepCache":true}"#,
    )?;
    agent.resident_kib()
}

/// Sends a request and ignores the response.
fn post(path: &str, body: &str) -> Outcome<()> {
    let mut connection = TcpStream::connect(address())?;
    write!(
        connection,
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    connection.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Opens a stream and waits for its first event.
fn stream(method: &str, message: &str) -> Outcome<TcpStream> {
    let mut connection = TcpStream::connect(address())?;
    connection.set_read_timeout(Some(Duration::from_secs(30)))?;
    let length = u32::try_from(message.len())?;
    write!(
        connection,
        "POST /process.Process/{method} HTTP/1.1\r\nhost: x\r\ncontent-type: application/connect+json\r\ncontent-length: {}\r\n\r\n",
        length + 5
    )?;
    connection.write_all(&[0])?;
    connection.write_all(&length.to_be_bytes())?;
    connection.write_all(message.as_bytes())?;
    let mut seen = Vec::new();
    let mut piece = [0; 4096];
    while !String::from_utf8_lossy(&seen).contains("\"start\"") {
        match connection.read(&mut piece)? {
            0 => return Err(format!("the {method} stream ended before its start event").into()),
            length => seen.extend(&piece[..length]),
        }
    }
    Ok(connection)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
