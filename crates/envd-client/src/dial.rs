//! Opening of connections: the client's side of a byte stream to the guest agent.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use connectrpc::ConnectError;
use futures::future::BoxFuture;
use http::Uri;
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::deadline::HEALTH_DEADLINE;

/// Opens connections to the guest agent of one sandbox.
pub trait Dial: Send + Sync + 'static {
    /// Opens a new connection. An error is returned to the caller of the client unchanged.
    fn dial(&self) -> BoxFuture<'_, Result<Stream, ConnectError>>;
}

/// Byte stream of a connection.
trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Connection to a guest agent. Dropping it closes the connection.
pub struct Stream(Box<dyn Io>);

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").finish_non_exhaustive()
    }
}

impl Stream {
    /// Wraps a byte stream.
    pub fn new(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        Self(Box::new(io))
    }
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

/// Connects to the guest's address.
pub(crate) struct TcpDial(pub(crate) SocketAddr);

impl Dial for TcpDial {
    fn dial(&self) -> BoxFuture<'_, Result<Stream, ConnectError>> {
        Box::pin(async move {
            let connect = tokio::time::timeout(HEALTH_DEADLINE, TcpStream::connect(self.0));
            let stream = connect
                .await
                .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                .map_err(|error| {
                    ConnectError::unavailable("failed to connect to the guest agent")
                        .with_source(error)
                })?;
            // Best effort: a failure only costs speed.
            let _ = stream.set_nodelay(true);
            Ok(Stream::new(stream))
        })
    }
}

/// Connector of the HTTP client. All requests go to one guest agent, so the URI is not used.
#[derive(Clone)]
pub(crate) struct Connector(pub(crate) Arc<dyn Dial>);

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<Stream>;
    type Error = ConnectError;
    type Future = BoxFuture<'static, Result<Self::Response, ConnectError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let dial = Arc::clone(&self.0);
        Box::pin(async move { dial.dial().await.map(TokioIo::new) })
    }
}
