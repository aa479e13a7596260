//! WebSockets: opening, talking JSON, closing.
//!
//! A message is handed to the connection and flushed before the next one is asked for, so a client that reads slowly
//! slows whatever is being sent. Nothing is dropped, and nothing is stored beyond that one message.

use std::time::Duration;

use axum::{
    extract::{
        FromRequestParts, WebSocketUpgrade,
        ws::{CloseFrame, Message, WebSocket, close_code},
    },
    response::Response,
};
use futures::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use http::{StatusCode, request::Parts};
use serde::{Serialize, de::DeserializeOwned};
use wrenn_proto::SandboxId;

use super::{
    AppState,
    error::{ApiError, Code},
};
use crate::lifecycle::Lifecycle;

/// The largest message of a client: as text, some more than the 3 MiB of input that it carries at most.
const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;

/// Larger ones are not even read: the connection is cut. Between the two, the client is told.
const MAX_READ_BYTES: usize = 4 * MAX_MESSAGE_BYTES;

/// Until the client says what it wants.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the client may take to read what is left and to close in its turn. The connection must not be cut before:
/// what the client has not read yet would be lost.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(60);

/// The same, when the server ends.
const SHUTDOWN_CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a silent client is pinged.
pub(super) const PING_EVERY: Duration = Duration::from_secs(30);

/// A request to become a WebSocket.
pub(super) struct ApiSocket(WebSocketUpgrade);

impl<S: Send + Sync> FromRequestParts<S> for ApiSocket {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match WebSocketUpgrade::from_request_parts(parts, state).await {
            Ok(upgrade) => Ok(Self(upgrade)),
            Err(rejection) => {
                let message = format!("this route speaks WebSocket: {}", rejection.body_text());
                let error = ApiError::new(Code::InvalidRequest, message);
                Err(match rejection.status() {
                    StatusCode::UPGRADE_REQUIRED => error.with_status(StatusCode::UPGRADE_REQUIRED),
                    _ => error,
                })
            }
        }
    }
}

impl ApiSocket {
    /// Checks the sandbox, upgrades, and runs the session, which ends in its own time after the server was told to.
    pub(super) async fn open<F>(
        self,
        app: AppState,
        id: SandboxId,
        session: impl FnOnce(AppState, SandboxId, WebSocket) -> F + Send + 'static,
    ) -> Result<Response, ApiError>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let row = app.lifecycle.get(&id).await?;
        Lifecycle::require_enterable(&row)?;
        let upgrade = self
            .0
            .max_message_size(MAX_READ_BYTES)
            .max_frame_size(MAX_READ_BYTES);
        Ok(upgrade.on_upgrade(move |socket| {
            let sessions = app.sessions.clone();
            sessions.track_future(session(app, id, socket))
        }))
    }
}

/// The client is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gone;

/// The half towards the client.
pub(super) struct Outbox(SplitSink<WebSocket, Message>);

/// The half from the client.
pub(super) struct Inbox(SplitStream<WebSocket>);

pub(super) fn split(socket: WebSocket) -> (Outbox, Inbox) {
    let (sink, stream) = socket.split();
    (Outbox(sink), Inbox(stream))
}

impl Outbox {
    /// Sends a message and waits until the connection has taken it.
    pub(super) async fn say(&mut self, message: &impl Serialize) -> Result<(), Gone> {
        // Messages are structs of texts and numbers, which always are JSON.
        let text = serde_json::to_string(message).unwrap_or_default();
        self.send(Message::text(text)).await
    }

    /// Sends a ping of the protocol.
    pub(super) async fn ping(&mut self) -> Result<(), Gone> {
        self.send(Message::Ping(bytes::Bytes::new())).await
    }

    async fn send(&mut self, message: Message) -> Result<(), Gone> {
        self.0.send(message).await.map_err(|_| Gone)
    }

    /// Ends the session and waits, within bounds, until the client has read everything.
    pub(super) async fn close(mut self, mut inbox: Inbox, app: &AppState) {
        let ending = app.shutdown.is_cancelled();
        let (code, limit) = if ending {
            (close_code::AWAY, SHUTDOWN_CLOSE_TIMEOUT)
        } else {
            (close_code::NORMAL, CLOSE_TIMEOUT)
        };
        let frame = CloseFrame {
            code,
            reason: "".into(),
        };
        let closing = async {
            if self.send(Message::Close(Some(frame))).await.is_ok() {
                while let Some(Ok(_)) = inbox.0.next().await {}
            }
        };
        tokio::select! {
            _ = tokio::time::timeout(limit, closing) => {}
            () = async {
                app.shutdown.cancelled().await;
                tokio::time::sleep(SHUTDOWN_CLOSE_TIMEOUT).await;
            } => {}
        }
    }
}

impl Inbox {
    /// The client's next message. The inner error says why a message cannot be understood; the client may go on.
    pub(super) async fn next<T: DeserializeOwned>(&mut self) -> Result<Result<T, String>, Gone> {
        loop {
            match self.0.next().await {
                Some(Ok(Message::Text(text))) if text.len() > MAX_MESSAGE_BYTES => {
                    return Ok(Err(format!("it has more than {MAX_MESSAGE_BYTES} bytes")));
                }
                Some(Ok(Message::Text(text))) => {
                    return Ok(serde_json::from_str(&text).map_err(|e| e.to_string()));
                }
                Some(Ok(Message::Binary(_))) => {
                    return Ok(Err("messages are JSON in text frames".to_owned()));
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Gone),
            }
        }
    }

    /// The first message, which says what to do.
    pub(super) async fn first<T: DeserializeOwned>(&mut self) -> Result<Result<T, String>, Gone> {
        tokio::time::timeout(FIRST_MESSAGE_TIMEOUT, self.next())
            .await
            .unwrap_or_else(|_| Ok(Err("no message came in time".to_owned())))
    }
}
