//! DNS forwarder at the guest's gateway, for hosts whose nameservers a guest cannot reach: a resolver
//! on the host's loopback, on another address of the host, or with an IPv6 address.
//!
//! Forwards requests to the host's nameservers and their replies to the guest, byte for byte. The
//! forwarder does not parse messages and does not cache. Requests leave from the supervisor's
//! network namespace, that of the host.
//!
//! | limit                             | value                                                 |
//! |-----------------------------------|-------------------------------------------------------|
//! | UDP requests in progress          | [`MAX_REQUESTS`]; others are dropped, the guest sends |
//! |                                   | them again                                            |
//! | size of a UDP message             | [`MAX_MESSAGE_BYTES`]                                 |
//! | time until the next nameserver is | [`REPLY_DEADLINE`]                                    |
//! | asked                             |                                                       |
//! | TCP connections                   | [`MAX_CONNECTIONS`], [`CONNECTION_DEADLINE`] each     |

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    time::timeout,
};
use wrenn_proto::guest::DNS_PORT;

/// Maximum number of UDP requests in progress.
const MAX_REQUESTS: usize = 64;

/// Maximum size of a UDP message: the recommended maximum of EDNS (RFC 6891, section 6.2.5).
const MAX_MESSAGE_BYTES: usize = 4096;

/// Bytes of a message's header (RFC 1035, section 4.1.1). The first two identify the request.
const HEADER_BYTES: usize = 12;

/// Maximum time for a nameserver to reply before the next one is asked.
const REPLY_DEADLINE: Duration = Duration::from_secs(4);

/// Maximum number of TCP connections.
const MAX_CONNECTIONS: usize = 8;

/// Maximum duration of a TCP connection.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(30);

/// Returns the addresses of nameservers.
pub(crate) fn upstreams(addresses: &[IpAddr]) -> Vec<SocketAddr> {
    let with_port = |address: &IpAddr| SocketAddr::new(*address, DNS_PORT);
    addresses.iter().map(with_port).collect()
}

/// Forwards requests until the task is aborted.
pub(crate) async fn serve(socket: UdpSocket, listener: TcpListener, upstreams: Vec<SocketAddr>) {
    let upstreams: Arc<[SocketAddr]> = upstreams.into();
    tokio::join!(
        serve_udp(Arc::new(socket), upstreams.clone()),
        serve_tcp(listener, upstreams)
    );
}

async fn serve_udp(socket: Arc<UdpSocket>, upstreams: Arc<[SocketAddr]>) {
    let free = Arc::new(Semaphore::new(MAX_REQUESTS));
    let mut packet = [0; MAX_MESSAGE_BYTES];
    loop {
        let (length, client) = match socket.recv_from(&mut packet).await {
            Ok(received) => received,
            Err(error) => {
                back_off(&error).await;
                continue;
            }
        };
        let Ok(permit) = free.clone().try_acquire_owned() else {
            continue;
        };
        if length < HEADER_BYTES {
            continue;
        }
        let (request, upstreams) = (packet[..length].to_vec(), upstreams.clone());
        let socket = socket.clone();
        tokio::spawn(async move {
            let _permit = permit;
            if let Some(reply) = ask_all(&request, &upstreams).await {
                // If the reply is lost, the client sends another request.
                let _ = socket.send_to(&reply, client).await;
            }
        });
    }
}

/// Asks one nameserver after the other, and returns the first reply.
async fn ask_all(request: &[u8], upstreams: &[SocketAddr]) -> Option<Vec<u8>> {
    for upstream in upstreams {
        match timeout(REPLY_DEADLINE, ask(request, *upstream)).await {
            Ok(Ok(reply)) => return Some(reply),
            Ok(Err(error)) => tracing::debug!(%error, %upstream, "nameserver not reachable"),
            Err(_) => tracing::debug!(%upstream, "nameserver did not reply"),
        }
    }
    None
}

/// Sends a request from a port of its own, and waits for the reply to it.
async fn ask(request: &[u8], upstream: SocketAddr) -> io::Result<Vec<u8>> {
    let any: IpAddr = match upstream {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(upstream).await?;
    socket.send(request).await?;
    let mut reply = vec![0; MAX_MESSAGE_BYTES];
    loop {
        let length = socket.recv(&mut reply).await?;
        if length >= HEADER_BYTES && reply[..2] == request[..2] {
            reply.truncate(length);
            return Ok(reply);
        }
    }
}

async fn serve_tcp(listener: TcpListener, upstreams: Arc<[SocketAddr]>) {
    let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(permit) = free.clone().acquire_owned().await else {
            return;
        };
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) => {
                back_off(&error).await;
                continue;
            }
        };
        let upstreams = upstreams.clone();
        tokio::spawn(async move {
            let _permit = permit;
            let _ = timeout(CONNECTION_DEADLINE, forward(client, &upstreams)).await;
        });
    }
}

/// Connects a client with the first nameserver that accepts the connection.
async fn forward(mut client: TcpStream, upstreams: &[SocketAddr]) {
    for upstream in upstreams {
        if let Ok(Ok(mut server)) = timeout(REPLY_DEADLINE, TcpStream::connect(upstream)).await {
            // Either side may end the connection at any time.
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            return;
        }
    }
}

/// A persistent error must not cause a busy loop.
async fn back_off(error: &io::Error) {
    tracing::debug!(%error, "failed to receive a DNS request");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const REQUEST: &[u8] =
        b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x00\x00\x01\x00\x01";

    async fn udp() -> (UdpSocket, SocketAddr) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        let address = socket.local_addr().expect("an address");
        (socket, address)
    }

    async fn tcp() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        (listener, address)
    }

    /// Starts a forwarder, and returns its addresses for UDP and TCP.
    async fn start(upstreams: &[SocketAddr]) -> (SocketAddr, SocketAddr) {
        let ((socket, udp), (listener, tcp)) = (udp().await, tcp().await);
        tokio::spawn(serve(socket, listener, upstreams.to_vec()));
        (udp, tcp)
    }

    /// Answers each request with a wrong reply and the request itself, with the bit of a reply.
    async fn nameserver() -> SocketAddr {
        let (socket, address) = udp().await;
        tokio::spawn(async move {
            let mut packet = [0; MAX_MESSAGE_BYTES];
            while let Ok((length, from)) = socket.recv_from(&mut packet).await {
                let mut wrong = packet[..length].to_vec();
                wrong[0] ^= 0xff;
                packet[2] |= 0x80;
                let _ = socket.send_to(&wrong, from).await;
                let _ = socket.send_to(&packet[..length], from).await;
            }
        });
        address
    }

    async fn resolve(forwarder: SocketAddr) -> Vec<u8> {
        let (socket, _) = udp().await;
        socket.connect(forwarder).await.expect("connected");
        socket.send(REQUEST).await.expect("sent");
        let mut reply = vec![0; MAX_MESSAGE_BYTES];
        let length = timeout(Duration::from_secs(30), socket.recv(&mut reply)).await;
        reply.truncate(length.expect("in time").expect("a reply"));
        reply
    }

    #[tokio::test]
    async fn a_reply_with_the_requests_number_is_returned() {
        let (forwarder, _) = start(&[nameserver().await]).await;
        let mut expected = REQUEST.to_vec();
        expected[2] |= 0x80;
        assert_eq!(resolve(forwarder).await, expected);
    }

    #[tokio::test]
    async fn a_nameserver_that_is_not_there_is_skipped() {
        // The port was in use just now, so nothing listens on it.
        let gone = udp().await.1;
        let (forwarder, _) = start(&[gone, nameserver().await]).await;
        assert_eq!(resolve(forwarder).await[..2], REQUEST[..2]);
    }

    #[tokio::test]
    async fn connections_are_forwarded_too() {
        let (server, address) = tcp().await;
        let (_, forwarder) = start(&[address]).await;
        let answer = tokio::spawn(async move {
            let (mut connection, _) = server.accept().await.expect("accepted");
            let mut request = vec![0; REQUEST.len()];
            connection.read_exact(&mut request).await.expect("read");
            connection.write_all(&request).await.expect("written");
        });
        let mut client = TcpStream::connect(forwarder).await.expect("connected");
        client.write_all(REQUEST).await.expect("written");
        let mut reply = Vec::new();
        client.read_to_end(&mut reply).await.expect("read");
        assert_eq!(reply, REQUEST);
        answer.await.expect("no panic");
    }
}
