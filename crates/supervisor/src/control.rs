//! The supervisor's socket: requests of the agent, one packet each.

use std::{fs, io, path::Path};

use tokio::sync::{mpsc, oneshot};
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};
use wrenn_proto::supervise::{MAX_MESSAGE_BYTES, Reply, Request, files};

use crate::SupervisorError;

/// A request on its way to the machine's owner.
pub(crate) enum Command {
    /// Asks for the status.
    Status(oneshot::Sender<Reply>),
    /// Asks for the end.
    Stop(StopReply),
}

/// The answer to a stop: the process ends right after, so the answer must be on the wire before.
pub(crate) struct StopReply {
    reply: oneshot::Sender<Reply>,
    sent: oneshot::Receiver<()>,
}

impl StopReply {
    /// Answers, and waits until the answer was sent or nobody is there to read it.
    pub(crate) async fn send_and_flush(self, reply: Reply) {
        if self.reply.send(reply).is_ok() {
            // An error means that the connection's task is gone: then there is nothing to wait for.
            let _ = self.sent.await;
        }
    }
}

/// Binds the socket in the sandbox's folder, where a socket of an earlier supervisor may lie.
pub(crate) fn listen(dir: &Path) -> Result<UnixSeqpacketListener, SupervisorError> {
    let bind = || {
        match fs::remove_file(dir.join(files::SOCKET)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // A socket's address has 108 bytes; a folder's path may be longer, so the folder is named by descriptor.
        let folder = fs::File::open(dir)?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&folder);
        UnixSeqpacketListener::bind(format!("/proc/self/fd/{fd}/{}", files::SOCKET))
    };
    bind().map_err(SupervisorError::io("listen on its socket"))
}

/// Accepts connections until the process ends. Only root can reach the socket: its folder is closed to others.
pub(crate) async fn serve(mut listener: UnixSeqpacketListener, commands: mpsc::Sender<Command>) {
    loop {
        match listener.accept().await {
            Ok(connection) => {
                tokio::spawn(serve_connection(connection, commands.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "could not accept a connection");
                // For example, no descriptor left: it may pass.
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
        let (reply, sent) = match serde_json::from_slice(&packet[..length]) {
            Ok(request) => handle(request, &commands).await,
            Err(error) => {
                let reason = format!("not a request: {error}");
                (Reply::Refused { reason }, None)
            }
        };
        let Ok(text) = serde_json::to_vec(&reply) else {
            return;
        };
        if connection.send(&text).await.is_err() {
            return;
        }
        if let Some(sent) = sent {
            // The owner waits for this, unless it is gone already.
            let _ = sent.send(());
        }
    }
}

async fn handle(
    request: Request,
    commands: &mpsc::Sender<Command>,
) -> (Reply, Option<oneshot::Sender<()>>) {
    let (reply, answer) = oneshot::channel();
    let (sent_sender, sent) = oneshot::channel();
    let (command, sent_sender) = match request {
        Request::Status => (Command::Status(reply), None),
        Request::Stop => (Command::Stop(StopReply { reply, sent }), Some(sent_sender)),
    };
    let gone = Reply::Refused {
        reason: "the machine has ended".to_owned(),
    };
    if commands.send(command).await.is_err() {
        return (gone, None);
    }
    (answer.await.unwrap_or(gone), sent_sender)
}
