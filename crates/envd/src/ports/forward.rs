//! One forwarded port: a listener outside, and what goes through it.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use rustix::net::sockopt;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::plan::Target;

/// How long the server inside may take to accept.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// A peer that has gone without a word is found out after this long, and the probes that follow.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);

/// A forwarder. Its listener lives as long as it does; its connections until they end, or are cut.
#[derive(Debug)]
pub struct Forwarder {
    target: watch::Sender<Target>,
    accepting: JoinHandle<()>,
}

/// What all forwarders share.
#[derive(Debug, Clone)]
pub struct Limits {
    /// A permit a connection.
    pub connections: Arc<Semaphore>,
    /// All connections end now.
    pub cut: CancellationToken,
}

impl Forwarder {
    /// Listens outside, on the target's port.
    ///
    /// # Errors
    /// If the port is taken there, or the address is not this machine's.
    pub async fn open(outside: IpAddr, target: Target, limits: Limits) -> io::Result<Self> {
        // With SO_REUSEADDR, which the runtime sets: connections of the past do not stand in the way.
        let listener = TcpListener::bind(SocketAddr::new(outside, target.address.port())).await?;
        let (target, current) = watch::channel(target);
        let accepting = tokio::spawn(accept(listener, current, limits));
        Ok(Self { target, accepting })
    }

    /// Leads elsewhere from now on.
    pub fn aim(&self, target: Target) {
        self.target.send_if_modified(|current| {
            let is_other = *current != target;
            *current = target;
            is_other
        });
    }

    /// Listens no more; returns when the port is free.
    pub async fn close(self) {
        self.accepting.abort();
        // Only ever ends by being aborted.
        let _ = self.accepting.await;
    }
}

async fn accept(listener: TcpListener, target: watch::Receiver<Target>, limits: Limits) {
    loop {
        // Before a connection is taken: what waits in the kernel costs nothing here.
        let Ok(permit) = limits.connections.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((outside, _)) => {
                let inside = target.borrow().address;
                tokio::spawn(serve(outside, inside, permit, limits.cut.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "could not accept a connection to a forwarded port");
                // For example, no descriptor left: it may pass.
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Copies both ways until both are at their end; the end of one way is handed on while the other goes on.
async fn serve(
    mut outside: TcpStream,
    inside: SocketAddr,
    _permit: OwnedSemaphorePermit,
    cut: CancellationToken,
) {
    let copy = async {
        let Ok(Ok(mut inside)) = timeout(CONNECT_DEADLINE, TcpStream::connect(inside)).await else {
            refuse(&outside);
            return;
        };
        tune(&outside);
        let _ = inside.set_nodelay(true);
        if let Err(error) = copy_bidirectional(&mut outside, &mut inside).await {
            tracing::debug!(%error, "a forwarded connection broke");
            // What broke on one side must not look like a good end on the other.
            refuse(&outside);
            refuse(&inside);
        }
    };
    let done = cut.run_until_cancelled(copy).await;
    if done.is_none() {
        tracing::debug!(%inside, "a forwarded connection was cut");
    }
}

/// The peer gets a reset instead of an end.
fn refuse(stream: &TcpStream) {
    let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO));
}

/// Refusals are harmless: the connection is slower, or lives longer.
fn tune(outside: &TcpStream) {
    let _ = outside.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(outside, true);
    let _ = sockopt::set_tcp_keepidle(outside, KEEPALIVE_IDLE);
}
