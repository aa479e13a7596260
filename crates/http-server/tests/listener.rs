//! Clients at the limits: more clients than slots, and clients that are still connected at
//! shutdown.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Notify,
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use wrenn_http_server::{DRAIN_DEADLINE, DrainingBody, Limits, serve};

/// Maximum number of header fields of the test server.
const HEADERS: usize = 10;

/// Server that responds only when the test allows it.
struct Server {
    address: SocketAddr,
    /// Notified when a request is being answered.
    asked: Arc<Notify>,
    /// Lets one request be answered.
    go: Arc<Notify>,
    shutdown: CancellationToken,
    serving: JoinHandle<()>,
}

impl Server {
    async fn start(clients: usize) -> Self {
        Self::limited(clients, clients).await
    }

    async fn limited(clients: usize, clients_per_peer: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let (asked, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let shutdown = CancellationToken::new();
        let (says, waits) = (Arc::clone(&asked), Arc::clone(&go));
        let answer = move |_: Request<DrainingBody>, _| {
            let (says, waits) = (Arc::clone(&says), Arc::clone(&waits));
            async move {
                says.notify_one();
                waits.notified().await;
                Response::new(Full::new(Bytes::from_static(b"done")))
            }
        };
        let limits = Limits {
            clients,
            clients_per_peer,
            headers: HEADERS,
        };
        let serving = tokio::spawn(serve(listener, limits, answer, shutdown.clone()));
        Self {
            address,
            asked,
            go,
            shutdown,
            serving,
        }
    }

    async fn ask(&self) -> TcpStream {
        self.ask_from(1).await
    }

    /// Sends a request from the address 127.0.0.`host`.
    async fn ask_from(&self, host: u8) -> TcpStream {
        let socket = TcpSocket::new_v4().expect("a socket");
        let from = (Ipv4Addr::new(127, 0, 0, host), 0).into();
        socket.bind(from).expect("bound");
        let mut client = socket.connect(self.address).await.expect("connected");
        send(&mut client).await;
        client
    }

    /// Sends a request from the address 127.0.0.`host`, and lets it be answered.
    async fn answered_from(&self, host: u8) -> TcpStream {
        let mut client = self.ask_from(host).await;
        self.asked.notified().await;
        self.go.notify_one();
        assert!(is_answered(&mut client).await);
        client
    }

    /// Sends the head of a request whose four-byte body is withheld, and returns the response.
    async fn answer_post(&self, client: &mut TcpStream, fields: &str) -> String {
        let head = format!("POST / HTTP/1.1\r\nHost: here\r\n{fields}Content-Length: 4\r\n\r\n");
        client.write_all(head.as_bytes()).await.expect("sent");
        self.go.notify_one();
        read_to(client, "done").await
    }
}

async fn send(client: &mut TcpStream) {
    let request = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n";
    client.write_all(request).await.expect("sent");
}

/// True if the server closes the connection without sending anything.
async fn is_closed(client: &mut TcpStream) -> bool {
    client.read(&mut [0; 8]).await.unwrap_or(0) == 0
}

/// True if a complete response arrived instead of the end of the connection.
async fn is_answered(client: &mut TcpStream) -> bool {
    let mut buffer = [0; 1024];
    let length = client.read(&mut buffer).await.unwrap_or(0);
    buffer[..length].starts_with(b"HTTP/1.1 200") && buffer[..length].ends_with(b"done")
}

#[tokio::test]
async fn request_in_progress_at_shutdown_is_answered() {
    let server = Server::start(10).await;
    let mut client = server.ask().await;
    server.asked.notified().await;
    server.shutdown.cancel();
    server.go.notify_one();
    assert!(is_answered(&mut client).await);
    server.serving.await.expect("ended");
}

#[tokio::test]
async fn incomplete_request_is_dropped() {
    let server = Server::start(10).await;
    let mut client = server.ask().await;
    server.asked.notified().await;
    // From here on, time advances only when every task waits for it.
    tokio::time::pause();
    let begun = Instant::now();
    server.shutdown.cancel();
    server.serving.await.expect("ended");
    assert!(begun.elapsed() >= DRAIN_DEADLINE, "{:?}", begun.elapsed());
    assert!(!is_answered(&mut client).await);
}

#[tokio::test]
async fn request_with_too_many_header_fields_is_rejected() {
    let server = Server::start(10).await;
    for (fields, status) in [(HEADERS, "200"), (HEADERS + 1, "431")] {
        let mut client = TcpStream::connect(server.address).await.expect("connected");
        let request = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(fields));
        client.write_all(request.as_bytes()).await.expect("sent");
        server.go.notify_one();
        let mut answer = [0; 12];
        client.read_exact(&mut answer).await.expect("answered");
        let expected = format!("HTTP/1.1 {status}");
        assert_eq!(String::from_utf8_lossy(&answer), expected, "{fields}");
    }
}

#[tokio::test]
async fn client_above_the_limit_waits_for_a_free_connection() {
    let server = Server::limited(1, 2).await;
    let mut first = server.ask().await;
    server.asked.notified().await;
    let mut second = server.ask().await;
    let early = tokio::time::timeout(Duration::from_millis(200), server.asked.notified());
    assert!(early.await.is_err(), "two at the same time");
    server.go.notify_one();
    assert!(is_answered(&mut first).await);
    drop(first);
    server.asked.notified().await;
    server.go.notify_one();
    assert!(is_answered(&mut second).await);
}

#[tokio::test]
async fn oldest_idle_connection_makes_room() {
    let server = Server::start(2).await;
    let mut oldest = server.answered_from(1).await;
    let mut newer = server.answered_from(1).await;
    let mut third = server.answered_from(2).await;
    assert!(is_closed(&mut oldest).await);
    for client in [&mut newer, &mut third] {
        send(client).await;
        server.asked.notified().await;
        server.go.notify_one();
        assert!(is_answered(client).await);
    }
}

#[tokio::test]
async fn busy_connection_never_makes_room() {
    let server = Server::start(2).await;
    let mut idle = server.answered_from(1).await;
    let mut busy = server.ask().await;
    server.asked.notified().await;
    let mut third = server.ask_from(2).await;
    server.asked.notified().await;
    assert!(is_closed(&mut idle).await);
    server.go.notify_one();
    server.go.notify_one();
    for client in [&mut busy, &mut third] {
        assert!(is_answered(client).await);
    }
}

#[tokio::test]
async fn silent_connection_makes_room_after_a_second() {
    let server = Server::start(2).await;
    let mut silent = TcpStream::connect(server.address).await.expect("connected");
    let mut idle = server.answered_from(1).await;
    // The silent connection is older, and yet an idle one goes first.
    let _second = server.answered_from(2).await;
    assert!(is_closed(&mut idle).await);
    send(&mut silent).await;
    server.asked.notified().await;
    server.go.notify_one();
    assert!(is_answered(&mut silent).await);

    let server = Server::start(1).await;
    let mut silent = TcpStream::connect(server.address).await.expect("connected");
    let _next = server.answered_from(2).await;
    assert!(is_closed(&mut silent).await);
}

#[tokio::test]
async fn peer_at_its_limit_shuts_out_only_itself() {
    let server = Server::limited(10, 2).await;
    let mut first = server.answered_from(1).await;
    let mut second = server.answered_from(1).await;
    // A third takes the place of the peer's own idle connection.
    let mut third = server.ask_from(1).await;
    server.asked.notified().await;
    assert!(is_closed(&mut first).await);
    send(&mut second).await;
    server.asked.notified().await;
    let mut fourth = server.ask_from(1).await;
    let answer = read_to(&mut fourth, "this address").await;
    assert!(answer.starts_with("HTTP/1.1 429 "), "{answer}");
    assert!(is_closed(&mut fourth).await);
    let mut other = server.ask_from(2).await;
    server.asked.notified().await;
    for _ in 0..3 {
        server.go.notify_one();
    }
    for client in [&mut second, &mut third, &mut other] {
        assert!(is_answered(client).await);
    }
}

/// Reads until the text ends with `end`.
async fn read_to(client: &mut TcpStream, end: &str) -> String {
    let (mut read, mut piece) = (String::new(), [0; 1024]);
    while !read.ends_with(end) {
        let length = client.read(&mut piece).await.expect("read");
        assert_ne!(length, 0, "closed after {read:?}");
        read.push_str(&String::from_utf8_lossy(&piece[..length]));
    }
    read
}

#[tokio::test]
async fn unread_body_is_drained_and_its_connection_reused() {
    let server = Server::start(1).await;
    let mut client = TcpStream::connect(server.address).await.expect("connected");
    server.answer_post(&mut client, "").await;
    client.write_all(b"late").await.expect("sent");
    // The bytes have already reached the server; this lets its task run.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    // The connection must not be treated as one in the middle of a request's head either, which has
    // a deadline of ten seconds.
    tokio::time::pause();
    tokio::time::sleep(Duration::from_secs(60)).await;
    tokio::time::resume();
    server.answer_post(&mut client, "").await;
}

#[tokio::test]
async fn endless_body_is_drained_until_its_deadline() {
    let server = Server::start(1).await;
    let mut client = TcpStream::connect(server.address).await.expect("connected");
    server.answer_post(&mut client, "").await;
    tokio::time::pause();
    assert_eq!(client.read(&mut [0; 8]).await.expect("closed"), 0);
}

#[tokio::test]
async fn expect_100_is_not_answered_if_the_body_is_not_read() {
    let server = Server::start(1).await;
    let mut client = TcpStream::connect(server.address).await.expect("connected");
    let answer = server
        .answer_post(&mut client, "Expect: 100-continue\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}
