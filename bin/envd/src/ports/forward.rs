//! Forwarder of one port: a listener on the guest's address, and its connections to the loopback
//! server.

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

/// Maximum time for the loopback server to accept a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Idle time before keepalive probes, which detect a peer that has disappeared.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);

/// Forwarder of a port. The listener lives as long as this value. Connections live until they end
/// or are cut.
#[derive(Debug)]
pub struct Forwarder {
    target: watch::Sender<Target>,
    accepting: JoinHandle<()>,
}

/// Limits that all forwarders share.
#[derive(Debug, Clone)]
pub struct Limits {
    /// One permit per connection.
    pub connections: Arc<Semaphore>,
    /// Ends all connections immediately.
    pub cut: CancellationToken,
}

impl Forwarder {
    /// Listens on the guest's address, on the target's port.
    ///
    /// # Errors
    /// Fails if the port is in use there, or the address is not the guest's.
    pub async fn open(outside: IpAddr, target: Target, limits: Limits) -> io::Result<Self> {
        // The runtime sets SO_REUSEADDR, so old connections do not prevent the bind.
        let listener = TcpListener::bind(SocketAddr::new(outside, target.address.port())).await?;
        let (target, current) = watch::channel(target);
        let accepting = tokio::spawn(accept(listener, current, limits));
        Ok(Self { target, accepting })
    }

    /// Changes the target for new connections.
    pub fn aim(&self, target: Target) {
        self.target.send_if_modified(|current| {
            let is_other = *current != target;
            *current = target;
            is_other
        });
    }

    /// Stops listening. Returns when the port is free.
    pub async fn close(self) {
        self.accepting.abort();
        // The task ends only by being aborted.
        let _ = self.accepting.await;
    }
}

async fn accept(listener: TcpListener, target: watch::Receiver<Target>, limits: Limits) {
    loop {
        // Acquired before a connection is accepted, because connections that wait in the kernel
        // cost nothing here.
        let Ok(permit) = limits.connections.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((outside, _)) => {
                let inside = target.borrow().address;
                tokio::spawn(serve(outside, inside, permit, limits.cut.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "accept on a forwarded port failed");
                // The cause may be temporary, for example no free descriptors.
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Copies in both directions until both have ended. The end of one direction is passed on while the
/// other continues.
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
            tracing::debug!(%error, "forwarded connection failed");
            // A failure on one side must not look like a normal end on the other.
            refuse(&outside);
            refuse(&inside);
        }
    };
    let done = cut.run_until_cancelled(copy).await;
    if done.is_none() {
        tracing::debug!(%inside, "forwarded connection cut");
    }
}

/// Makes the stream end with a reset instead of a normal end.
fn refuse(stream: &TcpStream) {
    let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO));
}

/// Sets socket options. Failures are harmless: the connection is slower or lives longer.
fn tune(outside: &TcpStream) {
    let _ = outside.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(outside, true);
    let _ = sockopt::set_tcp_keepidle(outside, KEEPALIVE_IDLE);
}
