//! Relay of the handshake from Firecracker to the page server.
//!
//! While Firecracker loads a snapshot, it connects to a socket and sends the layout of guest memory
//! with a userfaultfd. It then goes on with the load, which may need pages. So the load is answered
//! only if another process takes the message and serves pages. The driver passes the message on as it is;
//! the page server checks its content.
//!
//! | failure                              | result                                               |
//! |--------------------------------------|------------------------------------------------------|
//! | Firecracker exits                    | the call fails, and with it the relay, at once       |
//! | Firecracker rejects the snapshot     | the same, with the reason                            |
//! | Firecracker never connects, or sends | the deadline of the call                             |
//! | nothing                              |                                                      |
//! | no descriptor, too many, too long    | `Failed` at once; the VM must be killed              |
//! | loaded without a handshake           | `Protocol` after [`GRACE`]                           |
//!
//! In each case the page server's socket is closed, so that its reader does not wait any longer.

use std::{
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixListener as StdListener,
    },
    time::Duration,
};

use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
    time::timeout,
};
use wrenn_jail::SocketDir;
use wrenn_sys::scm;

use super::api::{Request as _, SnapshotLoad};
use crate::ControlError;

/// Name of the socket on which the driver listens.
pub(super) const PAGES_SOCKET: &str = "pages.sock";

/// Maximum length of the message, in bytes. That of the page server.
const MAX_MESSAGE_BYTES: usize = 16 * 1024;

/// Time from the answer to the load until the message must have arrived. It was sent before.
const GRACE: Duration = Duration::from_secs(1);

/// Step of the relay, for errors.
const STEP: &str = "pass the userfaultfd to the page server";

/// Socket that takes the handshake. The socket is removed when this value is dropped.
pub(super) struct Relay<'a> {
    sockets: &'a SocketDir,
    listener: UnixListener,
    /// Socket of the page server.
    pager: OwnedFd,
}

impl<'a> Relay<'a> {
    /// Listens for Firecracker.
    pub(super) fn listen(sockets: &'a SocketDir, pager: OwnedFd) -> Result<Self, ControlError> {
        let listener = sockets.listen(PAGES_SOCKET).and_then(asynchronous);
        Ok(Self {
            sockets,
            listener: listener.map_err(failed)?,
            pager,
        })
    }

    /// Relays the handshake while `load` runs. Returns when both are complete, or at the first
    /// failure.
    pub(super) async fn during(
        self,
        load: impl Future<Output = Result<(), ControlError>>,
    ) -> Result<(), ControlError> {
        let mut load = std::pin::pin!(load);
        let mut relayed = std::pin::pin!(self.relay());
        tokio::select! {
            done = &mut relayed => {
                done?;
                return load.await;
            }
            answer = &mut load => answer?,
        }
        // The message was sent before the answer, but may not have been passed on yet.
        let late = timeout(GRACE, relayed).await;
        late.unwrap_or_else(|_| {
            Err(ControlError::Protocol {
                command: SnapshotLoad::CALL,
                reason: "the snapshot was loaded without a userfaultfd".to_owned(),
            })
        })
    }

    async fn relay(&self) -> Result<(), ControlError> {
        let (stream, _) = self.listener.accept().await.map_err(failed)?;
        let (message, descriptor) = receive(&stream).await?;
        // One short message on an empty socket: it is sent at once and as a whole.
        scm::send(self.pager.as_fd(), &message, &[descriptor.as_fd()]).map_err(failed)
    }
}

impl Drop for Relay<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.sockets.remove(PAGES_SOCKET) {
            tracing::warn!(%error, "socket of the page server not removed");
        }
    }
}

fn asynchronous(listener: StdListener) -> io::Result<UnixListener> {
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

async fn receive(stream: &UnixStream) -> Result<(Vec<u8>, OwnedFd), ControlError> {
    let mut buffer = vec![0; MAX_MESSAGE_BYTES + 1];
    let received = stream
        .async_io(Interest::READABLE, || {
            scm::receive(stream.as_fd(), &mut buffer, 1)
        })
        .await
        .map_err(failed)?;
    let invalid = |reason: String| ControlError::Failed { step: STEP, reason };
    if received.len == 0 {
        return Err(invalid("the connection was closed".to_owned()));
    }
    if received.len > MAX_MESSAGE_BYTES {
        let reason = format!("the message is longer than {MAX_MESSAGE_BYTES} bytes");
        return Err(invalid(reason));
    }
    buffer.truncate(received.len);
    let count = received.descriptor_count;
    match (received.descriptors.into_iter().next(), count) {
        (Some(descriptor), 1) => Ok((buffer, descriptor)),
        _ => Err(invalid(format!(
            "the message has {count} descriptors, expected 1"
        ))),
    }
}

fn failed(source: io::Error) -> ControlError {
    ControlError::Io { step: STEP, source }
}
