//! Connections of the agent itself to the guest agent of a sandbox.
//!
//! The client keeps them open for later calls. They are counted, so that a VM's network is removed
//! only after they are closed ([`Tunnels::end_all`]).

use std::{
    future::Future as _,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use connectrpc::ConnectError;
use futures::future::BoxFuture;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_util::sync::WaitForCancellationFutureOwned;
use wrenn_envd_client::{Dial, Stream};

use super::{Tunnel, Tunnels};

/// Time for a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Connects to the guest agent.
pub(super) struct GuestDial {
    pub(super) address: SocketAddr,
    pub(super) connections: Arc<Tunnels>,
}

impl Dial for GuestDial {
    fn dial(&self) -> BoxFuture<'_, Result<Stream, ConnectError>> {
        Box::pin(async {
            let failed = |error: io::Error| {
                ConnectError::unavailable("failed to connect to the guest agent").with_source(error)
            };
            let slot = self.connections.open();
            let slot = slot.ok_or_else(|| failed(io::ErrorKind::QuotaExceeded.into()))?;
            let connect = TcpStream::connect(self.address);
            let connected = tokio::time::timeout(CONNECT_DEADLINE, connect).await;
            let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            let stream = connected.map_err(failed)?;
            // Best effort: a failure only costs speed.
            let _ = stream.set_nodelay(true);
            Ok(Stream::new(GuestStream::new(stream, slot)))
        })
    }
}

/// Connection that breaks when its slot is closed.
struct GuestStream {
    stream: TcpStream,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Released after the connection is closed.
    _slot: Tunnel,
}

impl GuestStream {
    fn new(stream: TcpStream, slot: Tunnel) -> Self {
        Self {
            stream,
            cut: Box::pin(slot.cut.clone().cancelled_owned()),
            _slot: slot,
        }
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // The client reads idle connections, too, to notice their end.
        if self.cut.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use tokio::{io::AsyncReadExt as _, net::TcpListener};

    use super::*;

    #[tokio::test]
    async fn idle_connection_ends_with_its_sandbox() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connections = Arc::<Tunnels>::default();
        let dial = GuestDial {
            address: listener.local_addr().unwrap(),
            connections: connections.clone(),
        };
        let mut stream = dial.dial().await.unwrap();
        let (mut peer, _) = listener.accept().await.unwrap();
        // As the client's pool does.
        let client = tokio::spawn(async move { stream.read(&mut [0; 16]).await });
        connections.end_all().await;
        assert!(client.await.unwrap().is_err());
        // The end of the connection has been sent when `end_all` returns.
        assert_eq!(peer.read(&mut [0; 16]).await.unwrap_or(0), 0);
    }
}
