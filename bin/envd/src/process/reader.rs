//! Reader of a process's output.

use std::{os::fd::OwnedFd, sync::Arc};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt as _, Interest, unix::AsyncFd},
    net::unix::pipe,
};
use tokio_util::sync::CancellationToken;

use super::output::{Kind, Output};

/// Maximum size of a chunk of a pipe's output, in bytes.
const PIPE_PIECE_BYTES: usize = 32 * 1024;
/// Maximum size of a chunk of a terminal's output, in bytes.
const TERMINAL_PIECE_BYTES: usize = 16 * 1024;
/// Maximum content of a pipe, in bytes. A process may have enlarged its pipe up to this size.
const PIPE_BYTES: usize = 1024 * 1024;

/// Source of output.
pub(super) enum Source {
    Pipe {
        kind: Kind,
        pipe: pipe::Receiver,
        buffer: BytesMut,
    },
    Terminal {
        master: Arc<AsyncFd<OwnedFd>>,
        buffer: Vec<u8>,
    },
}

impl Source {
    pub(super) fn pipe(kind: Kind, pipe: pipe::Receiver) -> Self {
        let buffer = BytesMut::with_capacity(PIPE_PIECE_BYTES);
        Self::Pipe { kind, pipe, buffer }
    }

    pub(super) fn terminal(master: Arc<AsyncFd<OwnedFd>>) -> Self {
        let buffer = vec![0; TERMINAL_PIECE_BYTES];
        Self::Terminal { master, buffer }
    }

    /// Publishes all data until every writer has closed its end. After a cancellation of `stop`,
    /// publishes the data that was written by then and returns.
    pub(super) async fn read(mut self, output: Arc<Output>, stop: CancellationToken) {
        let kind = self.kind();
        loop {
            let piece = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                piece = self.next() => piece,
            };
            let Some(piece) = piece else { return };
            output.publish(kind, piece).await;
        }
        // Bounded, because a process that continues to write would keep this loop running.
        let mut left = PIPE_BYTES;
        while left > 0
            && let Some(piece) = self.ready()
        {
            left = left.saturating_sub(piece.len());
            output.publish(kind, piece).await;
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Pipe { kind, .. } => *kind,
            Self::Terminal { .. } => Kind::Terminal,
        }
    }

    /// Returns the next chunk, or `None` at the end. Cancel safe.
    async fn next(&mut self) -> Option<Bytes> {
        match self {
            Self::Pipe { pipe, buffer, .. } => {
                buffer.reserve(PIPE_PIECE_BYTES);
                let length = pipe.read_buf(buffer).await.ok()?;
                (length > 0).then(|| buffer.split().freeze())
            }
            Self::Terminal { master, buffer } => {
                let read = |fd: &OwnedFd| Ok(rustix::io::read(fd, &mut buffer[..])?);
                // EIO is the end of file of a terminal: no process has its other side open.
                let length = master.async_io(Interest::READABLE, read).await.ok()?;
                (length > 0).then(|| Bytes::copy_from_slice(&buffer[..length]))
            }
        }
    }

    /// Returns a chunk that is available without waiting.
    fn ready(&mut self) -> Option<Bytes> {
        match self {
            Self::Pipe { pipe, buffer, .. } => {
                buffer.reserve(PIPE_PIECE_BYTES);
                let length = pipe.try_read_buf(buffer).ok()?;
                (length > 0).then(|| buffer.split().freeze())
            }
            Self::Terminal { master, buffer } => {
                let length = rustix::io::read(master.get_ref(), &mut buffer[..]).ok()?;
                (length > 0).then(|| Bytes::copy_from_slice(&buffer[..length]))
            }
        }
    }
}
