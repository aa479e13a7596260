//! Firecracker's handshake: the addresses of guest memory in the VMM, and the userfaultfd that
//! reports its page faults.
//!
//! The handshake is one message on a unix stream socket: a JSON array of regions, with exactly one
//! descriptor attached by SCM_RIGHTS. There is no reply. The preload library sends the same message
//! for QEMU. A VMM may die before it connects, or never send anything, so every wait has a deadline
//! and ends when `cancel` becomes readable. The descriptors of a rejected message are closed.

use std::{
    io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    net::SocketFlags,
};
use wrenn_sys::{
    pagemap::descriptor_name,
    scm::{self, Received},
    uffd::Uffd,
};

use crate::region::{RegionError, Regions};

/// Maximum message length, in bytes. [`crate::region::MAX_REGIONS`] entries of maximum length fit.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024;

/// Name of a userfaultfd in `/proc`.
const DESCRIPTOR_NAME: &str = "anon_inode:[userfaultfd]";

/// Handshake of a VMM, sent before it runs.
#[derive(Debug)]
pub struct Handshake {
    /// Addresses of guest memory.
    pub regions: Regions,
    /// Userfaultfd that reports missing pages of guest memory.
    pub uffd: Uffd,
}

/// Reason why a handshake failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// No VMM connected before the deadline.
    #[error("timed out waiting for the VMM to connect")]
    NotConnected,
    /// The VMM connected, but sent nothing before the deadline.
    #[error("timed out waiting for the handshake of the connected VMM")]
    Silent,
    /// The caller cancelled the handshake.
    #[error("the handshake was cancelled")]
    Cancelled,
    /// The VMM closed the connection.
    #[error("the VMM closed the connection without sending a message")]
    Closed,
    /// The message is longer than any valid message.
    #[error("the message is longer than {MAX_MESSAGE_BYTES} bytes")]
    TooLong,
    /// The message carries another number of descriptors than expected.
    #[error("received {got} descriptors with the message, expected {want}")]
    Descriptors {
        /// Number of received descriptors.
        got: usize,
        /// Number of expected descriptors.
        want: usize,
    },
    /// The descriptor is of another kind.
    #[error("the descriptor is {0}, not a userfaultfd")]
    NotUserfaultfd(String),
    /// The description of guest memory is invalid.
    #[error("invalid handshake message")]
    Regions(#[from] RegionError),
    /// A system call failed.
    #[error("{call} failed")]
    Io {
        /// Name of the system call.
        call: &'static str,
        /// Error returned by the kernel.
        source: io::Error,
    },
}

/// Waits for a VMM to connect to `listener`, and for its message.
///
/// The listener becomes non-blocking. `cancel` is any descriptor that becomes readable when the
/// caller gives up.
///
/// # Errors
/// [`HandshakeError`]
pub fn accept(
    listener: &UnixListener,
    cancel: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<Handshake, HandshakeError> {
    receive(&connection(listener, cancel, deadline)?, cancel, deadline)
}

/// Waits for the message on a connection.
///
/// # Errors
/// [`HandshakeError`]
pub fn receive(
    stream: &UnixStream,
    cancel: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<Handshake, HandshakeError> {
    let (regions, descriptor) = message(stream, cancel, deadline, 1)?;
    let descriptor = descriptor.ok_or(HandshakeError::Descriptors { got: 0, want: 1 })?;
    let name = descriptor_name(descriptor.as_fd()).map_err(|source| HandshakeError::Io {
        call: "readlink",
        source,
    })?;
    if name != DESCRIPTOR_NAME {
        return Err(HandshakeError::NotUserfaultfd(name));
    }
    Ok(Handshake {
        regions,
        uffd: Uffd::from_received(descriptor),
    })
}

/// Waits for the message of a VMM whose memory is not paged: a description without a descriptor.
///
/// # Errors
/// [`HandshakeError`]
pub fn receive_layout(
    stream: &UnixStream,
    cancel: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<Regions, HandshakeError> {
    let (regions, _) = message(stream, cancel, deadline, 0)?;
    Ok(regions)
}

fn connection(
    listener: &UnixListener,
    cancel: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<UnixStream, HandshakeError> {
    let io_error = |source| HandshakeError::Io {
        call: "accept",
        source,
    };
    listener.set_nonblocking(true).map_err(io_error)?;
    loop {
        if !readable(listener.as_fd(), cancel, deadline)? {
            return Err(HandshakeError::NotConnected);
        }
        match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(connection) => return Ok(UnixStream::from(connection)),
            Err(error) if is_transient(error) => {}
            Err(error) => return Err(io_error(error.into())),
        }
    }
}

/// True if the peer disconnected between poll and accept, or a signal interrupted the call. The
/// caller then waits for the next connection.
fn is_transient(error: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    matches!(error, Errno::AGAIN | Errno::INTR | Errno::CONNABORTED)
}

fn message(
    stream: &UnixStream,
    cancel: BorrowedFd<'_>,
    deadline: Instant,
    want: usize,
) -> Result<(Regions, Option<OwnedFd>), HandshakeError> {
    if !readable(stream.as_fd(), cancel, deadline)? {
        return Err(HandshakeError::Silent);
    }
    let mut buffer = vec![0; MAX_MESSAGE_BYTES + 1];
    let received =
        scm::receive(stream.as_fd(), &mut buffer, want).map_err(|source| HandshakeError::Io {
            call: "recvmsg",
            source,
        })?;
    let Received {
        len,
        mut descriptors,
        descriptor_count: got,
    } = received;
    if len == 0 {
        return Err(HandshakeError::Closed);
    }
    if len > MAX_MESSAGE_BYTES {
        return Err(HandshakeError::TooLong);
    }
    let regions = Regions::from_json(buffer.get(..len).unwrap_or_default())?;
    if got != want {
        return Err(HandshakeError::Descriptors { got, want });
    }
    Ok((regions, descriptors.pop()))
}

/// True if `fd` became readable (or reported an error) before the deadline.
fn readable(
    fd: BorrowedFd<'_>,
    cancel: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<bool, HandshakeError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        let mut fds = [
            PollFd::from_borrowed_fd(cancel, PollFlags::IN),
            PollFd::from_borrowed_fd(fd, PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => {
                return Err(HandshakeError::Io {
                    call: "poll",
                    source: error.into(),
                });
            }
        }
        let [cancelled, ready] = fds.map(|fd| !fd.revents().is_empty());
        if cancelled {
            return Err(HandshakeError::Cancelled);
        }
        if ready {
            return Ok(true);
        }
    }
}
