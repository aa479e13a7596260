//! Messages with file descriptors over a unix stream socket (SCM_RIGHTS, unix(7)).
//!
//! Received descriptors close on exec and on drop. Descriptors beyond the number that the caller
//! accepts are counted and closed at once, so that a peer cannot leak descriptors into this
//! process.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// Maximum number of descriptors per message: the kernel's SCM_MAX_FD.
pub const MAX_DESCRIPTORS: usize = 253;
/// Maximum number of descriptors that [`send`] accepts.
pub const MAX_SENT: usize = 8;

/// Result of one receive call.
#[derive(Debug)]
pub struct Received {
    /// Number of bytes written to the buffer; 0 at the end of the stream.
    pub len: usize,
    /// The first received descriptors, at most as many as the caller accepts.
    pub descriptors: Vec<OwnedFd>,
    /// Number of descriptors in the message, including the closed ones.
    pub descriptor_count: usize,
}

/// Sends `bytes` and `descriptors` as one message, without allocating. The peer receives duplicates
/// of the descriptors.
///
/// # Errors
/// The kernel's error; `WriteZero` if only a part was sent; `InvalidInput` for more than
/// [`MAX_SENT`] descriptors.
pub fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    if descriptors.len() > MAX_SENT {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SENT))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent = loop {
        let parts = [IoSlice::new(bytes)];
        match rustix::net::sendmsg(socket, &parts, &mut ancillary, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Receives one message into `buffer` and keeps at most `wanted` descriptors.
///
/// # Errors
/// The kernel's error; `WouldBlock` if nothing has arrived yet on a non-blocking socket.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], wanted: usize) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        let mut parts = [IoSliceMut::new(buffer)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(socket, &mut parts, &mut ancillary, flags) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut descriptors = Vec::new();
    let mut descriptor_count = 0;
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = part {
            for fd in fds {
                descriptor_count += 1;
                if descriptors.len() < wanted {
                    descriptors.push(fd);
                }
            }
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        // The kernel dropped some descriptors because this process has no room for more.
        descriptor_count += 1;
    }
    Ok(Received {
        len: message.bytes,
        descriptors,
        descriptor_count,
    })
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::{fd::AsFd as _, unix::net::UnixStream},
    };

    use super::*;

    #[test]
    fn extra_descriptors_are_counted_and_closed() {
        let (near, far) = UnixStream::pair().expect("pair");
        let (read, write) = rustix::pipe::pipe().expect("pipe");
        let many = [read.as_fd(), write.as_fd(), read.as_fd()];
        send(near.as_fd(), b"hello", &many).expect("sends");
        drop((read, write));
        let mut buffer = [0; 16];
        let received = receive(far.as_fd(), &mut buffer, 1).expect("receives");
        assert_eq!(received.len, 5);
        assert_eq!(received.descriptor_count, 3);
        assert_eq!(received.descriptors.len(), 1);
        // All writing ends are closed, so reading returns the end of the stream.
        let read = received.descriptors.into_iter().next().expect("one");
        assert_eq!(rustix::io::read(&read, &mut buffer).expect("reads"), 0);
        let flags = rustix::io::fcntl_getfd(&read).expect("flags");
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn closed_peer_is_end_of_stream_and_too_many_descriptors_are_rejected() {
        let (near, far) = UnixStream::pair().expect("pair");
        let file = fs::File::open("/dev/null").expect("opens");
        let nine = [file.as_fd(); 9];
        let error = send(near.as_fd(), b"x", &nine).expect_err("too many");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        drop(near);
        let received = receive(far.as_fd(), &mut [0; 4], 1).expect("receives");
        assert_eq!((received.len, received.descriptor_count), (0, 0));
    }
}
