//! HTTP/1.1 server for client connections: accepts them, enforces deadlines, and drains them at
//! shutdown.
//!
//! Owns a listener, the tasks of its connections and their deadlines (`connection`), and the part
//! of request bodies that handlers leave unread ([`DrainingBody`]). Never interprets requests or
//! responses, never buffers a body, and never guesses a protocol. HTTP/1.1 is what WebSockets need
//! here. A connection on which nothing arrives is timed from its start.
//!
//! Failures: when the process is out of file descriptors, accepting is retried after 100 ms. When
//! there are more clients than [`Limits::clients`], the others wait to be accepted. A request that
//! does not finish is dropped [`DRAIN_DEADLINE`] after shutdown began.
#![forbid(unsafe_code)]

mod connection;
mod draining_body;
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
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use draining_body::DrainingBody;

/// Time that requests have to finish after shutdown began.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// Delay after a failed accept: the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Limits of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of concurrent connections. Further clients wait to be accepted.
    pub clients: usize,
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
    let slots = Arc::new(Semaphore::new(limits.clients));
    loop {
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            accepted = accept(&listener, &slots) => accepted,
        };
        let Ok((stream, peer, slot)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let answer = answer.clone();
        let answer = move |request| answer(request, peer.ip());
        let serving = connection::serve(stream, limits.headers, answer, shutdown.clone());
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

/// Accepts the next connection once a slot is free.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots)
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let accepted = listener.accept().await;
    let (stream, peer) = accepted
        .inspect_err(|error| tracing::warn!(%error, "failed to accept client connection"))?;
    Ok((stream, peer, slot))
}
