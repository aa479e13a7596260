//! Control socket of the supervisor. Each packet is one request of the agent.

use std::{fs, io, os::fd::OwnedFd, path::Path};

use tokio::sync::{mpsc, oneshot};
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener, ancillary::AncillaryMessageWriter};
use wrenn_proto::supervise::{MAX_MESSAGE_BYTES, Reply, Request, files};

use crate::SupervisorError;

/// Size of the buffer for the descriptor that is attached to a reply, in bytes.
const ANCILLARY_BYTES: usize = 64;

/// Request to the actor of the VM.
pub(crate) enum Command {
    /// Request to stop the VM.
    Stop(StopReply),
    /// Any other request.
    Serve(Request, oneshot::Sender<ReplyMessage>),
}

/// Reply with an optional descriptor.
pub(crate) struct ReplyMessage {
    pub(crate) reply: Reply,
    pub(crate) descriptor: Option<OwnedFd>,
}

impl From<Reply> for ReplyMessage {
    fn from(reply: Reply) -> Self {
        Self {
            reply,
            descriptor: None,
        }
    }
}

/// Reply channel of a stop request. The process exits immediately afterwards, so the reply must be
/// sent before.
pub(crate) struct StopReply {
    reply: oneshot::Sender<ReplyMessage>,
    sent: oneshot::Receiver<()>,
}

impl StopReply {
    /// Sends the reply and waits until it is written to the socket or the connection is closed.
    pub(crate) async fn send_and_flush(self, reply: Reply) {
        if self.reply.send(reply.into()).is_ok() {
            // An error means that the connection's task has ended, so there is nothing to wait for.
            let _ = self.sent.await;
        }
    }
}

/// Binds the socket in the sandbox's directory. Replaces the socket of an earlier supervisor.
pub(crate) fn listen(dir: &Path) -> Result<UnixSeqpacketListener, SupervisorError> {
    let bind = || {
        match fs::remove_file(dir.join(files::SOCKET)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // A socket address is limited to 108 bytes, but the path of the directory may be longer.
        // The directory is therefore addressed by a descriptor.
        let sandbox_dir = fs::File::open(dir)?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&sandbox_dir);
        UnixSeqpacketListener::bind(format!("/proc/self/fd/{fd}/{}", files::SOCKET))
    };
    bind().map_err(SupervisorError::io("listen on the control socket"))
}

/// Accepts connections until the process ends. Only root can reach the socket, because its
/// directory is closed to other users.
pub(crate) async fn serve(mut listener: UnixSeqpacketListener, commands: mpsc::Sender<Command>) {
    loop {
        match listener.accept().await {
            Ok(connection) => {
                tokio::spawn(serve_connection(connection, commands.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "failed to accept a connection");
                // The error may be temporary, for example if no descriptor is available.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_connection(connection: UnixSeqpacket, commands: mpsc::Sender<Command>) {
    let mut packet = vec![0; MAX_MESSAGE_BYTES];
    while let Ok(info) = connection.recv(&mut packet).await {
        let length = info.bytes_read();
        if length == 0 {
            return;
        }
        let (answer, sent) = match serde_json::from_slice(&packet[..length]) {
            Ok(request) => handle(request, &commands).await,
            Err(error) => {
                let reason = format!("invalid request: {error}");
                (Reply::rejected(reason).into(), None)
            }
        };
        if send(&connection, &answer).await.is_err() {
            return;
        }
        if let Some(sent) = sent {
            // The owner of the VM waits for this message, unless it has already ended.
            let _ = sent.send(());
        }
    }
}

async fn send(connection: &UnixSeqpacket, answer: &ReplyMessage) -> io::Result<()> {
    let text = serde_json::to_vec(&answer.reply)?;
    let mut room = [0; ANCILLARY_BYTES];
    let mut ancillary = AncillaryMessageWriter::new(&mut room);
    if let Some(descriptor) = &answer.descriptor {
        ancillary.add_fds([descriptor])?;
    }
    connection
        .send_with_ancillary(&text, &mut ancillary)
        .await
        .map(drop)
}

async fn handle(
    request: Request,
    commands: &mpsc::Sender<Command>,
) -> (ReplyMessage, Option<oneshot::Sender<()>>) {
    let (reply, answer) = oneshot::channel();
    let (sent_sender, sent) = oneshot::channel();
    let (command, sent_sender) = match request {
        Request::Stop => (Command::Stop(StopReply { reply, sent }), Some(sent_sender)),
        other => (Command::Serve(other, reply), None),
    };
    let gone = || ReplyMessage::from(Reply::rejected("the VM has ended"));
    if commands.send(command).await.is_err() {
        return (gone(), None);
    }
    (answer.await.unwrap_or_else(|_| gone()), sent_sender)
}
