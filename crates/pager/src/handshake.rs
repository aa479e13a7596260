//! Firecracker's handshake: where guest memory lies in the VMM, and the userfaultfd that tells of its faults.
//!
//! One message on a unix stream socket: a JSON array of regions, and exactly one descriptor by SCM_RIGHTS. There is no
//! answer. The preload library of QEMU sends the same. A VMM may die before it connects, or say nothing: every wait has
//! a deadline and ends when `cancel` becomes readable. Descriptors of a message that is refused are closed.

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

/// The longest message, bytes: [`crate::region::MAX_REGIONS`] of the longest entries fit.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024;

/// How `/proc` names the right kind of descriptor.
const DESCRIPTOR_NAME: &str = "anon_inode:[userfaultfd]";

/// What a VMM tells before it runs.
#[derive(Debug)]
pub struct Handshake {
    /// Where guest memory lies.
    pub regions: Regions,
    /// Tells of its missing pages.
    pub uffd: Uffd,
}

/// Why there is no handshake.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// Nobody connected in time.
    #[error("the VMM did not connect in time")]
    NotConnected,
    /// Connected, but nothing came in time.
    #[error("the VMM connected and sent nothing in time")]
    Silent,
    /// The caller gave up.
    #[error("cancelled")]
    Cancelled,
    /// The VMM closed the connection.
    #[error("the VMM closed the connection without a message")]
    Closed,
    /// The message is longer than any of ours.
    #[error("the message is longer than {MAX_MESSAGE_BYTES} bytes")]
    TooLong,
    /// Not the number of descriptors that belongs to the message.
    #[error("{got} descriptors came with the message, expected {want}")]
    Descriptors {
        /// How many came.
        got: usize,
        /// How many belong there.
        want: usize,
    },
    /// A descriptor of another kind.
    #[error("the descriptor is {0}, not a userfaultfd")]
    NotUserfaultfd(String),
    /// The description of memory is wrong.
    #[error("the message is refused")]
    Regions(#[from] RegionError),
    /// A system call failed.
    #[error("{call} failed")]
    Io {
        /// Which.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Waits for a VMM to connect to `listener`, and for its message.
///
/// The listener becomes non-blocking. `cancel` is any descriptor that becomes readable when the caller gives up.
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

/// The peer went away between poll and accept, or a signal came: wait for the next.
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

/// Whether `fd` became readable (or has an error to tell) before the deadline.
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
