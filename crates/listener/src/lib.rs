//! Clients' HTTP/1.1 connections: accepts them, times them, and lets them finish at the end.
//!
//! Owns a listener, the tasks of its connections and their deadlines (`connection`), and what handlers leave of bodies
//! ([`Received`]). Never: knows what is asked or answered,
//! buffers a body, or guesses a protocol: HTTP/1.1 is what WebSockets need here, and a connection that says nothing is timed
//! from its start.
//!
//! What fails: a process out of file descriptors accepts again 100 ms later; more clients than [`Limits::clients`] wait to be
//! accepted; a request that does not end is dropped [`DRAIN_DEADLINE`] after the shutdown began.
#![forbid(unsafe_code)]

mod connection;
mod received;
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

pub use received::Received;

/// What requests get to finish at the end.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// Pause after an accept that failed: the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a listener lets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at the same time; more wait to be accepted.
    pub clients: usize,
    /// Header fields of one request; more are answered with 431.
    pub headers: usize,
}

/// Answers what comes in on a listener until `shutdown` is cancelled; then requests get [`DRAIN_DEADLINE`] to finish, and the
/// rest is dropped. `answer` gets the client's address too. An upgraded connection is its owner's, and not waited for.
pub async fn serve<A, F, B>(
    listener: TcpListener,
    limits: Limits,
    answer: A,
    shutdown: CancellationToken,
) where
    A: Fn(Request<Received>, IpAddr) -> F + Clone + Send + Sync + 'static,
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
        tracing::info!(left, "dropping requests that do not end");
        drop_all.cancel();
        connections.wait().await;
    }
}

/// The next connection, when there is room for it.
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
        .inspect_err(|error| tracing::warn!(%error, "cannot accept a client's connection"))?;
    Ok((stream, peer, slot))
}
