//! Reads what a process writes, piece by piece.

use std::{os::fd::OwnedFd, sync::Arc};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt as _, Interest, unix::AsyncFd},
    net::unix::pipe,
};
use tokio_util::sync::CancellationToken;

use super::output::{Kind, Output};

/// Largest piece of output of a pipe, bytes.
const PIPE_PIECE_BYTES: usize = 32 * 1024;
/// Largest piece of output of a terminal, bytes.
const TERMINAL_PIECE_BYTES: usize = 16 * 1024;
/// What a pipe may hold, bytes: its owner may have made it larger than it was, up to this.
const PIPE_BYTES: usize = 1024 * 1024;

/// What output is read from.
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

    /// Hands all that is written to an output, until nobody can write any more or, once that is asked for, until nothing is
    /// left of what was written by then.
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
        // Who goes on writing finds no end of it here.
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

    /// The next piece; `None` at the end. Cancel safe.
    async fn next(&mut self) -> Option<Bytes> {
        match self {
            Self::Pipe { pipe, buffer, .. } => {
                buffer.reserve(PIPE_PIECE_BYTES);
                let length = pipe.read_buf(buffer).await.ok()?;
                (length > 0).then(|| buffer.split().freeze())
            }
            Self::Terminal { master, buffer } => {
                let read = |fd: &OwnedFd| Ok(rustix::io::read(fd, &mut buffer[..])?);
                // EIO is a terminal's end of file: nobody has its other side open.
                let length = master.async_io(Interest::READABLE, read).await.ok()?;
                (length > 0).then(|| Bytes::copy_from_slice(&buffer[..length]))
            }
        }
    }

    /// A piece that is there.
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
