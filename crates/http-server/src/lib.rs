//! HTTP/1.1 server for client connections: accepts them, enforces deadlines, and drains them at
//! shutdown.
//!
//! Owns a listener, the tasks of its connections and their deadlines (`connection`), and the part
//! of request bodies that handlers leave unread ([`DrainingBody`]). Never interprets requests or
//! responses, never buffers a body, and never guesses a protocol. HTTP/1.1 is what WebSockets need
//! here. A connection on which nothing arrives is timed from its start.
//!
//! Failures: when the process is out of file descriptors, accepting is retried after 100 ms. When
//! there are [`Limits::clients`] connections, idle ones make room for further clients (`clients`),
//! and these wait if none is idle. A peer with more than [`Limits::clients_per_peer`] connections
//! that are all in use is answered 429. A request that does not finish is dropped
//! [`DRAIN_DEADLINE`] after shutdown began.
#![forbid(unsafe_code)]

mod clients;
mod connection;
mod draining_body;
mod reject;
mod watched;

use std::{
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use clients::{Clients, Slot, TooMany};
use reject::Rejections;

pub use draining_body::DrainingBody;

/// Time that requests have to finish after shutdown began.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// Delay after a failed accept: the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Limits of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of concurrent connections. A further client takes the place of an idle
    /// connection, or waits.
    pub clients: usize,
    /// Maximum number of concurrent connections per peer. A further client of the peer takes the
    /// place of an idle connection of the peer, or is answered 429.
    pub clients_per_peer: usize,
    /// Maximum number of header fields per request. A request with more is answered with 431.
    pub headers: usize,
}

/// Serves connections of `listener` until `shutdown` is cancelled. Requests in progress then have
/// [`DRAIN_DEADLINE`] to finish; the remaining ones are dropped.
///
/// `answer` also receives the client's address. An upgraded connection belongs to the code that
/// took it over and is not waited for.
pub async fn serve<A, F, B>(
    listener: TcpListener,
    limits: Limits,
    answer: A,
    shutdown: CancellationToken,
) where
    A: Fn(Request<DrainingBody>, IpAddr) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let connections = TaskTracker::new();
    let drop_all = CancellationToken::new();
    let clients = Clients::new(limits);
    let rejections = Rejections::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            accepted = accept(&listener, &clients, &rejections) => accepted,
        };
        let Ok((stream, peer, slot)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let answer = answer.clone();
        let answer = move |request| answer(request, peer.ip());
        let activity = Arc::clone(&slot.activity);
        let serving = connection::serve(stream, activity, limits.headers, answer, shutdown.clone());
        let drop_all = drop_all.clone();
        connections.spawn(async move {
            let _slot = slot;
            tokio::select! {
                () = serving => {}
                () = drop_all.cancelled() => {}
            }
        });
    }
    drop(listener);
    drain(&connections, &drop_all).await;
}

async fn drain(connections: &TaskTracker, drop_all: &CancellationToken) {
    connections.close();
    let drained = tokio::time::timeout(DRAIN_DEADLINE, connections.wait()).await;
    if drained.is_err() {
        let left = connections.len();
        tracing::info!(left, "drain deadline exceeded, dropping requests");
        drop_all.cancel();
        connections.wait().await;
    }
}

/// Accepts the next connection that finds a place.
async fn accept(
    listener: &TcpListener,
    clients: &Arc<Clients>,
    rejections: &Rejections,
) -> io::Result<(TcpStream, SocketAddr, Slot)> {
    loop {
        let accepted = listener.accept().await;
        let (stream, peer) = accepted
            .inspect_err(|error| tracing::warn!(%error, "failed to accept client connection"))?;
        match clients.admit(peer.ip()).await {
            Ok(slot) => return Ok((stream, peer, slot)),
            Err(TooMany) => {
                tracing::debug!(peer = %peer.ip(), "client rejected, its peer has too many connections");
                rejections.reject(stream);
            }
        }
    }
}
