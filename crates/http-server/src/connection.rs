//! One client connection: its deadlines and its end.
//!
//! ```text
//!            first byte            head complete
//!  Idle ───────────────► Head ───────────────────► Busy
//!   ▲  620 s: close        10 s: close               │
//!   └────────────────────────────────────────────────┘
//!                   response sent
//! ```
//! An idle connection may be closed at any time to make room for another client (`clients`). Its last
//! response is written before.
//!
//! A new connection starts in `Head`: the client has 10 s to send a complete request head. hyper's
//! own header timeout would also close a connection that is merely kept open for the next request,
//! so the deadlines are implemented here. There is no deadline while a request is answered:
//! commands and streams may run for any length of time. When a client disconnects, the request that
//! it had sent is cancelled.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::{Mutex, MutexGuard};
use tokio::{net::TcpStream, sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{DrainingBody, watched::Watched};

/// Time within which a request's head must be complete.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// Time that a connection may stay idle between two requests.
const IDLE_TIMEOUT: Duration = Duration::from_secs(620);

/// Time after which a connection in `Head` may be closed to make room for another client.
pub(crate) const STALLED: Duration = Duration::from_secs(1);

/// Time that a connection has to write its last response when it makes room for another client.
const EVICTION_TIMEOUT: Duration = Duration::from_secs(1);

/// Size of the read buffer per client, in bytes. Also limits the size of a request's head.
const MAX_BUFFER_BYTES: usize = 128 * 1024;

#[derive(Debug, Clone, Copy)]
enum Phase {
    Idle(Instant),
    Head(Instant),
    /// Number of requests that still have something to be read or written. It can exceed one: the
    /// body of the previous request may still be arriving while the next request is answered.
    Busy(usize),
}

/// State of a connection, shared by its reader, its service, its watch and the table of clients.
#[derive(Debug)]
pub(crate) struct Activity {
    phase: Mutex<Phase>,
    changed: Notify,
    /// Cancelled when the connection must make room for another client.
    evicted: CancellationToken,
    /// Notified when the connection becomes idle.
    room: Arc<Notify>,
}

/// Place of a waiting connection in the order in which connections make room for others: idle ones
/// first, and among those the one that has waited for the longest time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Waiting {
    is_in_head: bool,
    since: Instant,
}

impl Activity {
    /// Returns the state of a new connection. `room` is notified when the connection becomes idle.
    pub(crate) fn new(room: Arc<Notify>) -> Arc<Self> {
        Arc::new(Self {
            phase: Mutex::new(Phase::Head(Instant::now())),
            changed: Notify::new(),
            evicted: CancellationToken::new(),
            room,
        })
    }

    /// Returns the place of a connection that waits for its client; `None` if it must not be
    /// closed.
    pub(crate) fn waiting(&self) -> Option<Waiting> {
        match *self.phase() {
            Phase::Idle(since) => Some(Waiting {
                is_in_head: false,
                since,
            }),
            Phase::Head(since) if since.elapsed() >= STALLED => Some(Waiting {
                is_in_head: true,
                since,
            }),
            Phase::Head(_) | Phase::Busy(_) => None,
        }
    }

    /// Closes the connection as soon as no request is being answered.
    pub(crate) fn evict(&self) {
        self.evicted.cancel();
        self.changed.notify_one();
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock()
    }

    pub(crate) fn bytes_came(&self) {
        let mut phase = self.phase();
        if matches!(*phase, Phase::Idle(_)) {
            *phase = Phase::Head(Instant::now());
            self.changed.notify_one();
        }
    }

    /// Marks the start of a request. The connection stays busy until the returned guard is dropped.
    fn answering(self: &Arc<Self>) -> Arc<Answering> {
        let mut phase = self.phase();
        *phase = match *phase {
            Phase::Busy(others) => Phase::Busy(others + 1),
            Phase::Idle(_) | Phase::Head(_) => Phase::Busy(1),
        };
        self.changed.notify_one();
        Arc::new(Answering(Arc::clone(self)))
    }

    fn answered(&self) {
        let mut phase = self.phase();
        *phase = match *phase {
            Phase::Busy(requests) if requests > 1 => Phase::Busy(requests - 1),
            _ => Phase::Idle(Instant::now()),
        };
        self.changed.notify_one();
        self.room.notify_one();
    }

    /// Returns when the deadline of the current phase has passed. `evicted_at` is the time at which
    /// the connection was told to make room.
    async fn watch(&self, evicted_at: Option<Instant>) {
        loop {
            let deadline = match (*self.phase(), evicted_at) {
                (Phase::Busy(_), _) => None,
                (Phase::Idle(_) | Phase::Head(_), Some(at)) => Some(at + EVICTION_TIMEOUT),
                (Phase::Idle(since), None) => Some(since + IDLE_TIMEOUT),
                (Phase::Head(since), None) => Some(since + HEAD_TIMEOUT),
            };
            let changed = self.changed.notified();
            match deadline {
                None => changed.await,
                Some(deadline) => {
                    if tokio::time::timeout_at(deadline, changed).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

/// Guard of a request in progress. The connection becomes idle again when the request body and the
/// response body no longer hold it.
#[derive(Debug)]
pub(crate) struct Answering(Arc<Activity>);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.answered();
    }
}

/// Response body that keeps the connection busy for as long as it is being sent.
struct Given<B> {
    body: B,
    _busy: Arc<Answering>,
}

impl<B: Body<Data = Bytes> + Unpin> Body for Given<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Serves a connection until it closes, a deadline passes, or the current request is answered after
/// `shutdown` was cancelled or the connection was evicted. A request with more than `max_headers`
/// header fields is rejected with 431.
pub(crate) async fn serve<F, B>(
    stream: TcpStream,
    activity: Arc<Activity>,
    max_headers: usize,
    answer: impl Fn(Request<DrainingBody>) -> F,
    shutdown: CancellationToken,
) where
    F: Future<Output = Response<B>>,
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let io = TokioIo::new(Watched::new(stream, Arc::clone(&activity)));
    let answering = Arc::clone(&activity);
    let service = service_fn(move |request: Request<Incoming>| {
        let busy = answering.answering();
        let answered = answer(DrainingBody::during(request, Some(Arc::clone(&busy))));
        async move {
            let response = answered.await;
            Ok::<_, Infallible>(response.map(|body| Given { body, _busy: busy }))
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .preserve_header_case(true)
        .max_buf_size(MAX_BUFFER_BYTES)
        .max_headers(max_headers)
        .serve_connection(io, service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let mut stopping = false;
    let mut evicted_at = None;
    loop {
        tokio::select! {
            done = connection.as_mut() => {
                if let Err(error) = done {
                    tracing::debug!(%error, "client connection failed");
                }
                return;
            }
            () = activity.watch(evicted_at) => {
                tracing::debug!("connection timed out");
                return;
            }
            () = shutdown.cancelled(), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
            () = activity.evicted.cancelled(), if evicted_at.is_none() => {
                evicted_at = Some(Instant::now());
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}
