//! Connection pools, one per sandbox: connections are kept for the next request, counted, and
//! closed together.
//!
//! Each sandbox has its own client, so no sandbox waits for another's connections, and closing a
//! sandbox's connections ends its client. A connection belongs to one port. Unused pools are
//! dropped when the next pool is created.

use std::{
    collections::HashMap,
    fmt, io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use http::Uri;
use hyper_util::{
    client::legacy::{
        Client,
        connect::{Connected, Connection},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use wrenn_model::SandboxId;

use crate::{ConnectionKillSwitch, DialError, Sandboxes, body::RequestBody};

/// Time within which a connection to a port must be open.
const DIAL_DEADLINE: Duration = Duration::from_secs(5);

/// Time for which an idle connection is kept for the next request. Servers usually keep theirs at
/// least as long. Where one does not, the next request finds the connection closed and opens
/// another.
const KEPT_FOR: Duration = Duration::from_secs(55);

/// Maximum number of idle connections kept per port.
const KEPT_PER_PORT: usize = 16;

/// Size of the read buffer per connection, in bytes. Also limits the size of a response's head.
const MAX_BUFFER_BYTES: usize = 128 * 1024;

/// Connection pool of one sandbox.
pub(crate) struct Pool<S: Sandboxes> {
    pub(crate) client: Client<Dialer<S>, RequestBody>,
    pub(crate) cut: CancellationToken,
    slots: Arc<Semaphore>,
}

/// Connection pools of all sandboxes.
pub(crate) struct Pools<S: Sandboxes> {
    pools: Mutex<HashMap<SandboxId, Arc<Pool<S>>>>,
    sandboxes: Arc<S>,
    kill_switch: ConnectionKillSwitch,
    max_connections: usize,
}

impl<S: Sandboxes> Pools<S> {
    pub(crate) fn new(
        sandboxes: Arc<S>,
        kill_switch: ConnectionKillSwitch,
        max_connections: usize,
    ) -> Self {
        Self {
            pools: Mutex::default(),
            sandboxes,
            kill_switch,
            max_connections,
        }
    }

    /// Returns the pool of a sandbox, creating a new one if the previous one was closed.
    pub(crate) fn get(&self, id: &SandboxId) -> Arc<Pool<S>> {
        let mut pools = self.pools();
        if let Some(pool) = pools.get(id)
            && !pool.cut.is_cancelled()
        {
            return Arc::clone(pool);
        }
        pools.retain(|id, pool| {
            let is_used = Arc::strong_count(pool) > 1
                || pool.slots.available_permits() < self.max_connections;
            let is_kept = is_used && !pool.cut.is_cancelled();
            if !is_kept && !pool.cut.is_cancelled() {
                self.kill_switch.remove(id);
            }
            is_kept
        });
        let pool = Arc::new(self.make(id));
        pools.insert(id.clone(), Arc::clone(&pool));
        pool
    }

    fn make(&self, id: &SandboxId) -> Pool<S> {
        let cut = self.kill_switch.token(id);
        let slots = Arc::new(Semaphore::new(self.max_connections));
        let dialer = Dialer {
            sandboxes: Arc::clone(&self.sandboxes),
            id: id.clone(),
            cut: cut.clone(),
            slots: Arc::clone(&slots),
        };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(KEPT_FOR)
            .pool_max_idle_per_host(KEPT_PER_PORT)
            .set_host(false)
            .http1_preserve_header_case(true)
            .http1_max_buf_size(MAX_BUFFER_BYTES)
            .build(dialer);
        Pool { client, cut, slots }
    }

    fn pools(&self) -> MutexGuard<'_, HashMap<SandboxId, Arc<Pool<S>>>> {
        self.pools.lock()
    }
}

/// Connects to the ports of one sandbox; the URI gives the port.
pub(crate) struct Dialer<S> {
    sandboxes: Arc<S>,
    id: SandboxId,
    cut: CancellationToken,
    slots: Arc<Semaphore>,
}

impl<S> Clone for Dialer<S> {
    fn clone(&self) -> Self {
        Self {
            sandboxes: Arc::clone(&self.sandboxes),
            id: self.id.clone(),
            cut: self.cut.clone(),
            slots: Arc::clone(&self.slots),
        }
    }
}

impl<S: Sandboxes> tower::Service<Uri> for Dialer<S> {
    type Response = TokioIo<Link<S::Io>>;
    type Error = DialError;
    type Future = BoxFuture<'static, Result<Self::Response, DialError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let dialer = self.clone();
        Box::pin(async move {
            let cut = dialer.cut.clone();
            let dialing = tokio::time::timeout(
                DIAL_DEADLINE,
                dialer.dial(uri.port_u16().unwrap_or_default()),
            );
            tokio::select! {
                biased;
                () = cut.cancelled() => Err(DialError::NotRunning),
                dialed = dialing => dialed.map_err(|_| DialError::TimedOut(DIAL_DEADLINE))?,
            }
        })
    }
}

impl<S: Sandboxes> Dialer<S> {
    async fn dial(self, port: u16) -> Result<TokioIo<Link<S::Io>>, DialError> {
        let slot = self
            .slots
            .try_acquire_owned()
            .map_err(|_| DialError::TooMany)?;
        let io = self.sandboxes.dial(&self.id, port).await?;
        Ok(TokioIo::new(Link {
            io,
            ended: Box::pin(self.cut.clone().cancelled_owned()),
            cut: self.cut,
            answers: Answers::default(),
            _slot: slot,
        }))
    }
}

/// Number of requests that a connection has answered. Attached to each response and failure of the
/// connection.
#[derive(Clone, Default)]
pub(crate) struct Answers(Arc<AtomicU64>);

impl Answers {
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Connection to a port that fails as soon as the connections of its sandbox are closed.
pub(crate) struct Link<I> {
    io: I,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    cut: CancellationToken,
    answers: Answers,
    _slot: OwnedSemaphorePermit,
}

impl<I> fmt::Debug for Link<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").finish_non_exhaustive()
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> Connection for Link<I> {
    fn connected(&self) -> Connected {
        Connected::new().extra(self.answers.clone())
    }
}

impl<I> Link<I> {
    fn check(&self) -> io::Result<()> {
        if self.cut.is_cancelled() {
            return Err(cut());
        }
        Ok(())
    }
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the sandbox stopped")
}

impl<I: AsyncRead + Unpin> AsyncRead for Link<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Polled first, so that a waiting reader is woken when the sandbox stops.
        if self.ended.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(cut()));
        }
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Link<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.io).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
