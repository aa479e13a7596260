//! Connection to the peer: lines, ids and descriptors.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    time::Duration,
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Interest},
    net::UnixStream,
    time::timeout,
};

use crate::{
    MAX_LINE_BYTES, QmpError,
    message::{Message, command_line, parse_message},
};

/// Receiver of a connection's events. Keeps the state that its owner derives from events.
pub trait Subscriber {
    /// Handles an event. `data` is null if the event has none.
    fn on_event(&mut self, name: &str, data: &Value);
}

/// QMP connection after its negotiation.
pub struct Qmp<S> {
    stream: BufReader<UnixStream>,
    subscriber: S,
    /// Line that is being read. Kept here so that a read may be cancelled in the middle of a line.
    partial: Vec<u8>,
    /// Rest of a command whose call was cancelled in the middle of its line. The peer would
    /// otherwise take the next command for its end.
    unsent: Vec<u8>,
    last_id: u64,
    /// Violation of the protocol after which no message can be trusted.
    violation: Option<&'static str>,
    /// Version of QEMU, if it has been reported.
    version: Option<String>,
}

/// Creates a connection to a child process: the end of this process, and the end that the child
/// inherits.
///
/// # Errors
/// Fails if the sockets cannot be created.
pub fn socket_pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs.into()))
}

impl<S: Subscriber> Qmp<S> {
    /// Reads the peer's greeting and leaves negotiation mode. Events are passed to `subscriber`.
    ///
    /// # Errors
    /// `Deadline` if the peer does not complete the negotiation in time; another error if the
    /// connection is lost.
    pub async fn negotiate(
        stream: UnixStream,
        subscriber: S,
        deadline: Duration,
    ) -> Result<Self, QmpError> {
        let mut qmp = Self {
            stream: BufReader::new(stream),
            subscriber,
            partial: Vec::new(),
            unsent: Vec::new(),
            last_id: 0,
            violation: None,
            version: None,
        };
        let negotiated = async {
            while !matches!(qmp.read().await?, Message::Greeting(_)) {}
            qmp.call("qmp_capabilities", Value::Null, None).await
        };
        let step = "negotiate QMP";
        timeout(deadline, negotiated)
            .await
            .unwrap_or(Err(QmpError::Deadline { step, deadline }))?;
        Ok(qmp)
    }

    /// Version of QEMU, if the peer has reported it.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// Subscriber of the connection.
    pub fn subscriber(&self) -> &S {
        &self.subscriber
    }

    pub(crate) fn subscriber_mut(&mut self) -> &mut S {
        &mut self.subscriber
    }

    /// Passes events to the subscriber until the connection ends. Cancel safe.
    pub async fn drain(&mut self) {
        while self.read().await.is_ok() {}
    }

    /// Passes the next event to the subscriber. Cancel safe.
    pub(crate) async fn next_event(&mut self) -> Result<(), QmpError> {
        while !matches!(self.read().await?, Message::Event { .. }) {}
        Ok(())
    }

    /// Sends a command and waits for the reply with its id. If the call is cancelled, its reply is
    /// discarded when it arrives.
    pub(crate) async fn call(
        &mut self,
        name: &'static str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QmpError> {
        self.last_id += 1;
        let wanted = Some(self.last_id);
        let line = command_line(self.last_id, name, arguments);
        self.send(line, fd).await?;
        loop {
            match self.read().await? {
                Message::Return { id, value } if id == wanted => return Ok(value),
                Message::Error { id, class, desc } if id == wanted => {
                    let command = name;
                    return Err(QmpError::Command {
                        command,
                        class,
                        desc,
                    });
                }
                Message::Return { id, .. } | Message::Error { id, .. } => {
                    tracing::debug!(?id, awaited = name, "late QMP reply discarded");
                }
                Message::Greeting(_) | Message::Event { .. } => {}
            }
        }
    }

    async fn send(
        &mut self,
        mut line: Vec<u8>,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), QmpError> {
        if let Some(violation) = self.violation {
            return Err(QmpError::Malformed(violation));
        }
        self.send_rest().await?;
        // A command is kept only once its first byte is sent. One that was cancelled before must
        // not be executed later.
        let sent = send_once(self.stream.get_ref(), &line, fd).await?;
        self.unsent = line.split_off(sent);
        self.send_rest().await
    }

    /// Sends the unsent bytes. Cancel safe: bytes that were not sent are kept.
    async fn send_rest(&mut self) -> Result<(), QmpError> {
        while !self.unsent.is_empty() {
            let sent = send_once(self.stream.get_ref(), &self.unsent, None).await?;
            self.unsent.drain(..sent);
        }
        Ok(())
    }

    /// Reads one message, and passes it to the subscriber if it is an event. Cancel safe.
    async fn read(&mut self) -> Result<Message, QmpError> {
        if let Some(violation) = self.violation {
            return Err(QmpError::Malformed(violation));
        }
        let line = self.read_line().await?;
        let message = std::str::from_utf8(&line).ok().and_then(parse_message);
        let Some(message) = message else {
            return Err(self.violated("not a JSON object of QMP"));
        };
        match &message {
            Message::Greeting(version) => self.version.clone_from(version),
            Message::Event { name, data } => {
                tracing::debug!(event = %name, "QMP event");
                self.subscriber.on_event(name, data);
            }
            // The peer could not parse a command, and does not name it.
            Message::Error { id: None, desc, .. } => {
                tracing::warn!(%desc, "QMP error without an id");
                return Err(self.violated("error without the id of a command"));
            }
            Message::Return { .. } | Message::Error { .. } => {}
        }
        Ok(message)
    }

    /// Reads one line. Cancel safe: the part read so far is kept for the next call.
    async fn read_line(&mut self) -> Result<Vec<u8>, QmpError> {
        loop {
            let available = self.stream.fill_buf().await?;
            if available.is_empty() {
                return Err(QmpError::Closed);
            }
            let end = available.iter().position(|byte| *byte == b'\n');
            let take = end.map_or(available.len(), |at| at + 1);
            if self.partial.len() + take > MAX_LINE_BYTES {
                self.partial = Vec::new();
                return Err(self.violated("line too long"));
            }
            self.partial.extend_from_slice(&available[..take]);
            self.stream.consume(take);
            if end.is_some() {
                return Ok(std::mem::take(&mut self.partial));
            }
        }
    }

    fn violated(&mut self, violation: &'static str) -> QmpError {
        self.violation = Some(violation);
        QmpError::Malformed(violation)
    }
}

/// Sends a part of `bytes` once the socket accepts it, with `fd` beside the first byte. Returns the
/// length of the part.
async fn send_once(
    socket: &UnixStream,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<usize> {
    let send = || {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if let Some(fd) = &fd {
            control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(fd)));
        }
        let parts = [io::IoSlice::new(bytes)];
        Ok(sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL)?)
    };
    socket.async_io(Interest::WRITABLE, send).await
}
