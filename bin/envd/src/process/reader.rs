//! Reader of a process's output.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use rustix::io::{ioctl_fionread, read, retry_on_intr};
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
/// More than the kernel buffers for a terminal, in bytes.
const TERMINAL_BYTES: u64 = 1024 * 1024;
/// Size of the reads whose data is dropped, in bytes. Small, because each command whose descendants
/// live on may have one.
const DISCARD_BYTES: usize = 4096;

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
    /// publishes the data that was written by then and returns; a task of its own drops all later
    /// data.
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
        // Bounded, because a descendant that continues to write would keep this loop running.
        let mut left = self.buffered_bytes();
        while left > 0
            && let Some(piece) = self.ready()
        {
            left = left.saturating_sub(u64::try_from(piece.len()).unwrap_or(u64::MAX));
            output.publish(kind, piece).await;
        }
        tokio::spawn(self.discard());
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
                let read = |fd: &OwnedFd| Ok(read(fd, &mut buffer[..])?);
                // EIO is the end of file of a terminal: no process has its other side open.
                let length = master.async_io(Interest::READABLE, read).await.ok()?;
                (length > 0).then(|| Bytes::copy_from_slice(&buffer[..length]))
            }
        }
    }

    /// Returns the maximum number of bytes that the kernel holds for envd.
    fn buffered_bytes(&self) -> u64 {
        match self {
            // The exact number, because root can enlarge a pipe without a limit.
            Self::Pipe { pipe, .. } => ioctl_fionread(pipe).unwrap_or(0),
            // The kernel passes a terminal's data on with a delay, so it cannot tell the number.
            Self::Terminal { .. } => TERMINAL_BYTES,
        }
    }

    /// Returns a chunk that is available without waiting. Asks the kernel and not the runtime, which
    /// may not have noticed yet that there is data.
    fn ready(&mut self) -> Option<Bytes> {
        let mut piece = vec![0; PIPE_PIECE_BYTES];
        let length = retry_on_intr(|| read(self.descriptor(), &mut piece[..])).ok()?;
        piece.truncate(length);
        (length > 0).then(|| piece.into())
    }

    fn descriptor(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Self::Pipe { pipe, .. } => pipe.as_fd(),
            Self::Terminal { master, .. } => master.get_ref().as_fd(),
        }
    }

    /// Reads and drops data until every writer has closed its end. Descendants that live on are
    /// then neither blocked by a full pipe nor killed by a broken one.
    async fn discard(self) {
        match self {
            Self::Pipe { pipe, buffer, .. } => {
                drop(buffer);
                while pipe.readable().await.is_ok() && is_open(pipe.try_read(&mut scratch())) {}
            }
            Self::Terminal { master, buffer } => {
                drop(buffer);
                while let Ok(mut ready) = master.readable().await {
                    let skim = |fd: &AsyncFd<OwnedFd>| Ok(read(fd.get_ref(), &mut scratch()[..])?);
                    // An error of `try_io` means that there is nothing to read now.
                    if ready.try_io(skim).is_ok_and(|read| !is_open(read)) {
                        break;
                    }
                }
            }
        }
    }
}

fn scratch() -> [u8; DISCARD_BYTES] {
    [0; DISCARD_BYTES]
}

/// True if the result of a read is not the end of the data.
fn is_open(read: io::Result<usize>) -> bool {
    match read {
        Ok(length) => length > 0,
        Err(error) => matches!(
            error.kind(),
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
        ),
    }
}
