//! Simulated sandboxes, a proxy in front of them, and clients that see every byte.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;
use wrenn_model::SandboxId;
use wrenn_proxy::{
    ConnectionKillSwitch, DialError, Found, Proxy, ProxyConfig, Rejected, Sandboxes, SignedLink,
    Target,
};

/// Deadline of every step; a step that takes longer hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const ID: &str = "i0123456789abcdefghij";
pub(crate) const OTHER: &str = "sb-0a1b2c3d";

#[derive(Default)]
pub(crate) struct Sandbox {
    pub(crate) target: Target,
    pub(crate) token: String,
    /// True until the sandbox is resolved.
    pub(crate) paused: bool,
    pub(crate) refused: Option<Rejected>,
    /// Errors with which the next connections fail.
    pub(crate) dial_errors: Vec<DialError>,
    pub(crate) ports: HashMap<u16, mpsc::UnboundedSender<DuplexStream>>,
}

#[derive(Default)]
pub(crate) struct World {
    pub(crate) sandboxes: Mutex<HashMap<String, Sandbox>>,
    pub(crate) uses: Arc<AtomicUsize>,
    pub(crate) looked_up: AtomicUsize,
    pub(crate) resolved: AtomicUsize,
    /// True if no search for the signer of a link may take place.
    pub(crate) is_overloaded: AtomicBool,
}

impl World {
    fn find(&self, is_it: impl Fn(&Sandbox) -> bool) -> Option<SandboxId> {
        let sandboxes = self.sandboxes.lock();
        let mut found = sandboxes.iter().filter(|(_, sandbox)| is_it(sandbox));
        found.next().map(|(id, _)| id.parse().unwrap())
    }

    fn target(&self, id: &SandboxId) -> Result<Found, Rejected> {
        let sandboxes = self.sandboxes.lock();
        let sandbox = sandboxes.get(id.as_str()).ok_or(Rejected::NotFound)?;
        if let Some(refused) = &sandbox.refused {
            return Err(refused.clone());
        }
        let token = (!sandbox.token.is_empty()).then(|| sandbox.token.clone());
        Ok(Found {
            target: Target {
                guest_token: sandbox.target.guest_token.clone().or(token),
                ..sandbox.target.clone()
            },
            is_running: !sandbox.paused,
        })
    }
}

pub(crate) struct Use(Arc<AtomicUsize>);

impl Drop for Use {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Sandboxes for World {
    type Io = DuplexStream;
    type Use = Use;

    async fn look_up(&self, id: &SandboxId) -> Result<Found, Rejected> {
        self.looked_up.fetch_add(1, Ordering::SeqCst);
        self.target(id)
    }

    async fn resolve(&self, id: &SandboxId) -> Result<Target, Rejected> {
        self.resolved.fetch_add(1, Ordering::SeqCst);
        if let Some(sandbox) = self.sandboxes.lock().get_mut(id.as_str()) {
            sandbox.paused = false;
        }
        Ok(self.target(id)?.target)
    }

    async fn signed_by(&self, link: &SignedLink<'_>) -> Result<Option<SandboxId>, Rejected> {
        if self.is_overloaded.load(Ordering::SeqCst) {
            return Err(Rejected::TooManySearches);
        }
        Ok(self.find(|sandbox| link.is_signed_with(&sandbox.token)))
    }

    async fn with_token(&self, token: &str) -> Result<Option<SandboxId>, Rejected> {
        Ok(self.find(|sandbox| sandbox.token == token))
    }

    async fn dial(&self, id: &SandboxId, port: u16) -> Result<DuplexStream, DialError> {
        let mut sandboxes = self.sandboxes.lock();
        let sandbox = sandboxes
            .get_mut(id.as_str())
            .ok_or(DialError::NotRunning)?;
        if let Some(error) = sandbox.dial_errors.pop() {
            return Err(error);
        }
        let port = sandbox.ports.get(&port).ok_or(DialError::PortClosed)?;
        let (near, far) = tokio::io::duplex(64 * 1024);
        port.send(far).map_err(|_| DialError::PortClosed)?;
        Ok(near)
    }

    fn begin_use(&self, _: &SandboxId) -> Use {
        self.uses.fetch_add(1, Ordering::SeqCst);
        Use(Arc::clone(&self.uses))
    }
}

/// Proxy with two sandboxes, [`ID`] and [`OTHER`].
pub(crate) struct Setup {
    pub(crate) world: Arc<World>,
    pub(crate) kill_switch: ConnectionKillSwitch,
    pub(crate) address: SocketAddr,
    shutdown: CancellationToken,
}

impl Drop for Setup {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Setup {
    pub(crate) async fn new() -> Self {
        Self::with(ProxyConfig::default()).await
    }

    pub(crate) async fn with(config: ProxyConfig) -> Self {
        let world = Arc::<World>::default();
        for id in [ID, OTHER] {
            world
                .sandboxes
                .lock()
                .insert(id.to_owned(), Sandbox::default());
        }
        let kill_switch = ConnectionKillSwitch::default();
        let proxy = Proxy::new(Arc::clone(&world), kill_switch.clone(), config);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let until = shutdown.clone();
        tokio::spawn(async move { proxy.serve(listener, until).await });
        Self {
            world,
            kill_switch,
            address,
            shutdown,
        }
    }

    pub(crate) fn change<T>(&self, id: &str, change: impl FnOnce(&mut Sandbox) -> T) -> T {
        change(self.world.sandboxes.lock().get_mut(id).unwrap())
    }

    /// Opens a port of a sandbox; the test serves it.
    pub(crate) fn open(&self, id: &str, port: u16) -> Port {
        let (sender, connections) = mpsc::unbounded_channel();
        self.change(id, |sandbox| sandbox.ports.insert(port, sender));
        Port(connections)
    }

    /// Opens a client connection.
    pub(crate) async fn client(&self) -> Wire<TcpStream> {
        Wire::new(TcpStream::connect(self.address).await.unwrap())
    }

    /// Sends a request on its own connection and returns the whole response.
    pub(crate) async fn ask(&self, request: &str) -> Answer {
        let mut client = self.client().await;
        client.send(request).await;
        client.answer().await
    }

    /// Waits until no request is being answered.
    pub(crate) async fn until_unused(&self) {
        let unused = async {
            while self.world.uses.load(Ordering::SeqCst) != 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, unused)
            .await
            .expect("all uses end");
    }
}

/// Builds a request with the routing headers.
pub(crate) fn request(first_line: &str, id: &str, port: u16, rest: &str) -> String {
    format!(
        "{first_line} HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: {id}\r\nE2b-Sandbox-Port: {port}\r\n{rest}\r\n"
    )
}

pub(crate) fn get(path: &str, id: &str, port: u16) -> String {
    request(&format!("GET {path}"), id, port, "")
}

/// Port in a sandbox.
pub(crate) struct Port(mpsc::UnboundedReceiver<DuplexStream>);

impl Port {
    /// Waits for the next connection to the port.
    pub(crate) async fn accept(&mut self) -> Wire<DuplexStream> {
        let io = tokio::time::timeout(PATIENCE, self.0.recv()).await;
        Wire::new(io.expect("a connection in time").expect("the proxy lives"))
    }

    /// True if there was no further connection.
    pub(crate) fn is_quiet(&mut self) -> bool {
        self.0.try_recv().is_err()
    }

    /// Answers every request of every connection with the text that `answer` derives from its head.
    pub(crate) fn serve(mut self, answer: impl Fn(&str) -> String + Send + Sync + Clone + 'static) {
        tokio::spawn(async move {
            while let Some(io) = self.0.recv().await {
                let answer = answer.clone();
                tokio::spawn(async move {
                    let mut wire = Wire::new(io);
                    while let Some(head) = wire.try_head().await {
                        wire.send(&answer(&head)).await;
                    }
                });
            }
        });
    }
}

/// Response as received.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) head: String,
    pub(crate) body: String,
    /// True if the body has the length that the head declares.
    pub(crate) is_complete: bool,
}

impl Answer {
    pub(crate) fn status(&self) -> u16 {
        self.head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .unwrap()
    }
}

/// One end of a connection, read and written byte by byte.
pub(crate) struct Wire<I> {
    pub(crate) io: I,
    read: Vec<u8>,
}

impl<I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Wire<I> {
    pub(crate) fn new(io: I) -> Self {
        let read = Vec::new();
        Self { io, read }
    }

    pub(crate) async fn send(&mut self, text: &str) {
        let sending = self.io.write_all(text.as_bytes());
        let _ = tokio::time::timeout(PATIENCE, sending)
            .await
            .expect("written in time");
    }

    /// Reads up to and including `end`, and returns the text. `None` if the connection ends first.
    pub(crate) async fn try_until(&mut self, end: &str) -> Option<String> {
        loop {
            let found = self
                .read
                .windows(end.len())
                .position(|window| window == end.as_bytes());
            if let Some(at) = found {
                let text = self.read.drain(..at + end.len()).collect();
                return Some(String::from_utf8(text).unwrap());
            }
            if !self.more().await {
                return None;
            }
        }
    }

    pub(crate) async fn until(&mut self, end: &str) -> String {
        let found = self.try_until(end).await;
        found.unwrap_or_else(|| panic!("no {end:?} in {:?}", String::from_utf8_lossy(&self.read)))
    }

    pub(crate) async fn try_head(&mut self) -> Option<String> {
        self.try_until("\r\n\r\n").await
    }

    pub(crate) async fn head(&mut self) -> String {
        self.until("\r\n\r\n").await
    }

    /// Waits for the end of the connection; true if no further data came first.
    pub(crate) async fn is_ended(&mut self) -> bool {
        self.read.is_empty() && !self.more().await
    }

    async fn more(&mut self) -> bool {
        let mut buffer = [0; 16 * 1024];
        let read = tokio::time::timeout(PATIENCE, self.io.read(&mut buffer)).await;
        let count = read.expect("something in time").unwrap_or(0);
        self.read.extend_from_slice(&buffer[..count]);
        count > 0
    }

    /// Reads a response by its `Content-Length` or its chunks, or up to the end of the connection.
    pub(crate) async fn answer(&mut self) -> Answer {
        let head = self.head().await;
        let lower = head.to_ascii_lowercase();
        let length = lower
            .split("content-length: ")
            .nth(1)
            .and_then(|rest| rest.split("\r\n").next()?.parse::<usize>().ok());
        let mut body = Vec::new();
        let is_complete = if lower.contains("transfer-encoding: chunked") {
            self.chunks(&mut body).await.is_some()
        } else if let Some(length) = length {
            while self.read.len() < length && self.more().await {}
            let count = length.min(self.read.len());
            body.extend(self.read.drain(..count));
            count == length
        } else {
            while self.more().await {}
            body.append(&mut self.read);
            true
        };
        let body = String::from_utf8(body).unwrap();
        Answer {
            head,
            body,
            is_complete,
        }
    }

    async fn chunks(&mut self, body: &mut Vec<u8>) -> Option<()> {
        loop {
            let line = self.try_until("\r\n").await?;
            let length = usize::from_str_radix(line.trim_end(), 16).ok()?;
            if length == 0 {
                return Some(());
            }
            while self.read.len() < length + 2 {
                if !self.more().await {
                    body.append(&mut self.read);
                    return None;
                }
            }
            body.extend(self.read.drain(..length));
            self.read.drain(..2);
        }
    }
}
