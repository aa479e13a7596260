//! Connections that are open while a snapshot or a fork of their sandbox is made: a command, a
//! terminal, a response that streams through the traffic listener, and an upgraded connection.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    net::TcpStream,
};
use wrenn_e2e::{
    Sandbox, Service,
    wait::{GENEROUS, until},
    ws::Socket,
};

use crate::exec::decode;

/// Prints consecutive numbers twenty times per second until the file `/root/end` exists, or serves
/// them at port 9000: as a response, or after an upgrade.
const TICKER: &str = r#"
import itertools, os, socket, sys, threading, time
def numbers():
    for number in itertools.count():
        if os.path.exists("/root/end"): return
        yield f"{number}\n"
        time.sleep(0.05)
def serve(peer):
    file = peer.makefile("rw", newline="")
    head = list(iter(lambda: file.readline().strip().lower(), ""))
    upgrade = any(line.startswith("upgrade:") for line in head)
    status = "101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: ticks"
    file.write(f"HTTP/1.1 {status if upgrade else '200 OK' + chr(13) + chr(10) + 'Connection: close'}\r\n\r\n")
    for line in numbers():
        file.write(line)
        file.flush()
    file.write("end\n")
    file.flush()
    peer.shutdown(socket.SHUT_RDWR)
if sys.argv[1] == "print":
    for line in numbers(): print(line, end="", flush=True)
    print("end", flush=True)
else:
    server = socket.create_server(("0.0.0.0", 9000))
    while True: threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"#;

/// Maximum time without a number. A snapshot pauses the guest for a fraction of a second; the rest
/// is for slow machines.
const MAX_GAP: Duration = Duration::from_secs(10);

/// Checks that numbers arrive one after the other.
struct Ticks {
    what: &'static str,
    next: u64,
    last: Instant,
    gap: Duration,
}

impl Ticks {
    fn new(what: &'static str) -> Self {
        Self {
            what,
            next: 0,
            last: Instant::now(),
            gap: Duration::ZERO,
        }
    }

    /// Takes a line. Returns true at the end.
    fn take(&mut self, line: &str) -> Result<bool> {
        if self.next > 0 {
            self.gap = self.gap.max(self.last.elapsed());
        }
        self.last = Instant::now();
        if line.trim() == "end" {
            return Ok(true);
        }
        let number: u64 = line.trim().parse().context(self.what)?;
        ensure!(
            number == self.next,
            "{}: {number} after {}",
            self.what,
            self.next
        );
        self.next += 1;
        Ok(false)
    }

    fn finish(&self) -> Result<()> {
        ensure!(self.next > 5, "{}: {} numbers", self.what, self.next);
        ensure!(
            self.gap < MAX_GAP,
            "{}: silent for {:?}",
            self.what,
            self.gap
        );
        println!(
            "{}: {} numbers, longest gap {:?}",
            self.what, self.next, self.gap
        );
        Ok(())
    }
}

/// Reads the numbers of a WebSocket in messages of a type.
async fn from_socket(mut socket: Socket, kind: &str, mut ticks: Ticks) -> Result<()> {
    let mut text = String::new();
    loop {
        let message = socket.next_of(kind).await?;
        let data = message["data"].as_str().context("no data")?;
        match kind {
            "output" => text.push_str(&decode(data)),
            _ => text.push_str(data),
        }
        while let Some((line, rest)) = text.split_once('\n') {
            let (line, rest) = (line.to_owned(), rest.to_owned());
            if ticks.take(&line)? {
                return ticks.finish();
            }
            text = rest;
        }
    }
}

/// Reads the numbers of a connection.
async fn from_connection(mut lines: Lines<BufReader<TcpStream>>, mut ticks: Ticks) -> Result<()> {
    while let Some(line) = lines.next_line().await.context(ticks.what)? {
        if ticks.take(&line)? {
            return ticks.finish();
        }
    }
    anyhow::bail!("{}: closed after {} numbers", ticks.what, ticks.next)
}

/// Opens a connection to the ticker through the traffic listener, and reads the response head.
async fn connect(
    service: &Service,
    id: &str,
    fields: &str,
    status: &str,
) -> Result<Lines<BufReader<TcpStream>>> {
    let mut connection = TcpStream::connect(service.traffic_listen()).await?;
    // A body for HTTP/1.0 is not divided into chunks.
    let version = if status == "101" { "1.1" } else { "1.0" };
    let head = format!(
        "GET / HTTP/{version}\r\nHost: {}\r\nE2b-Sandbox-Id: {id}\r\nE2b-Sandbox-Port: 9000\r\n{fields}\r\n",
        service.traffic_listen()
    );
    connection.write_all(head.as_bytes()).await?;
    let mut reader = BufReader::new(connection);
    let mut first = String::new();
    reader.read_line(&mut first).await?;
    ensure!(
        first.starts_with(&format!("HTTP/{version} {status}")),
        "{first}"
    );
    let mut line = first;
    while !line.trim().is_empty() {
        line.clear();
        reader.read_line(&mut line).await?;
    }
    Ok(reader.lines())
}

async fn start(service: &Service, path: &str, cmd: Value) -> Result<Socket> {
    let mut socket = Socket::open(service, path).await?;
    socket.send(&cmd).await?;
    Ok(socket)
}

async fn post(service: &Service, path: &str, body: Value) -> Result<Value> {
    let (status, reply) = service.json(Method::POST, path, &body).await?;
    ensure!(status.is_success(), "{path}: {status}: {reply}");
    Ok(reply)
}

#[tokio::test]
async fn no_connection_is_cut_by_a_snapshot_or_a_fork() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    let id = sandbox.id().to_owned();
    sandbox.write("/root/ticker.py", TICKER).await?;
    let serve =
        json!({ "cmd": "python3", "args": ["/root/ticker.py", "serve"], "background": true });
    post(&service, &sandbox.path("/exec"), serve).await?;
    until("the ticker answers", GENEROUS, async || {
        let answer = connect(&service, &id, "Connection: close\r\n", "200").await;
        Ok(answer.ok().map(drop))
    })
    .await?;

    let args = json!(["/root/ticker.py", "print"]);
    let command = json!({ "type": "start", "cmd": "python3", "args": args, "timeout_sec": 0 });
    let command = start(&service, &sandbox.path("/exec/stream"), command).await?;
    let terminal = json!({ "type": "start", "cmd": "python3", "args": args });
    let terminal = start(&service, &sandbox.path("/pty?output=base64"), terminal).await?;
    let streamed = connect(&service, &id, "Connection: close\r\n", "200").await?;
    let upgrade = "Connection: upgrade\r\nUpgrade: ticks\r\n";
    let upgraded = connect(&service, &id, upgrade, "101").await?;

    let disturb = async {
        let name = json!({ "sandbox_id": id, "name": "held" });
        post(&service, "/v1/snapshots?overwrite=true", name.clone()).await?;
        let copies = post(&service, &sandbox.path("/fork"), json!({ "count": 1 })).await?;
        post(&service, "/v1/snapshots?overwrite=true", name).await?;
        sandbox.shell("touch /root/end").await?;
        let copy = copies[0]["id"].as_str().context("no copy")?.to_owned();
        Sandbox::new(&service, copy).destroy().await
    };
    let (disturbed, command, terminal, streamed, upgraded) = tokio::join!(
        disturb,
        from_socket(command, "stdout", Ticks::new("command")),
        from_socket(terminal, "output", Ticks::new("terminal")),
        from_connection(streamed, Ticks::new("response")),
        from_connection(upgraded, Ticks::new("upgraded connection")),
    );
    disturbed?;
    for outcome in [command, terminal, streamed, upgraded] {
        outcome?;
    }
    sandbox.destroy().await
}
