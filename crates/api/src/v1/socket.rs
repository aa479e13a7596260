//! WebSockets: opening, messages, closing. Messages are JSON in text frames; binary frames are
//! those of terminals.
//!
//! A message is handed to the connection and flushed before the next one is requested, so a client
//! that reads slowly slows down the sender. Nothing is dropped, and at most that one message is
//! buffered.

use std::time::Duration;

use axum::{
    extract::{
        FromRequestParts, WebSocketUpgrade,
        ws::{CloseFrame, Message, WebSocket, close_code},
    },
    response::Response,
};
use bytes::Bytes;
use futures::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use http::{StatusCode, request::Parts};
use serde::{Serialize, de::DeserializeOwned};
use wrenn_control::lifecycle::Lifecycle;
use wrenn_model::SandboxId;

use crate::{
    app::AppState,
    error::{ApiError, Code},
};

/// Maximum size of a client message, in bytes. A message carries at most 3 MiB of input, which is
/// somewhat longer as text.
const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;

/// Messages above this size are not read: the connection is cut. Messages between
/// [`MAX_MESSAGE_BYTES`] and this size are answered with an error.
const MAX_READ_BYTES: usize = 4 * MAX_MESSAGE_BYTES;

/// Maximum time until the client's first message.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(60);

/// Maximum time for the client to read the remaining messages and to close its side. The connection
/// must stay open until then: messages that the client has not read would be lost.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(60);

/// The same limit while the server shuts down.
const SHUTDOWN_CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Interval between pings to a silent client.
pub(super) const PING_EVERY: Duration = Duration::from_secs(30);

/// Request for a WebSocket upgrade.
pub(super) struct ApiSocket(WebSocketUpgrade);

impl<S: Send + Sync> FromRequestParts<S> for ApiSocket {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match WebSocketUpgrade::from_request_parts(parts, state).await {
            Ok(upgrade) => Ok(Self(upgrade)),
            Err(rejection) => {
                let message = format!(
                    "this route requires a WebSocket upgrade: {}",
                    rejection.body_text()
                );
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
    /// Checks the sandbox, upgrades the connection and runs the session. A shutdown of the server
    /// waits for the session to end.
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

/// Message of a client: JSON in a text frame, or a binary frame.
pub(super) trait Incoming: DeserializeOwned {
    /// Returns the message that a binary frame is; `None` if the protocol has none.
    fn from_binary(bytes: Bytes) -> Option<Self>;
}

/// Message to a client: JSON in a text frame, or a binary frame.
pub(super) trait Outgoing: Serialize {
    /// Returns the content of a message that is a binary frame.
    fn as_binary(&self) -> Option<Bytes>;
}

/// Error of a connection whose client has disconnected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gone;

/// Sending half, towards the client.
pub(super) struct Outbox(SplitSink<WebSocket, Message>);

/// Receiving half, from the client.
pub(super) struct Inbox(SplitStream<WebSocket>);

pub(super) fn split(socket: WebSocket) -> (Outbox, Inbox) {
    let (sink, stream) = socket.split();
    (Outbox(sink), Inbox(stream))
}

impl Outbox {
    /// Sends a message and waits until the connection has taken it.
    pub(super) async fn send(&mut self, message: &impl Outgoing) -> Result<(), Gone> {
        if let Some(bytes) = message.as_binary() {
            return self.send_frame(Message::Binary(bytes)).await;
        }
        // Messages are structs of strings and numbers, which always serialize to JSON.
        let text = serde_json::to_string(message).unwrap_or_default();
        self.send_frame(Message::text(text)).await
    }

    /// Sends a WebSocket ping frame.
    pub(super) async fn ping(&mut self) -> Result<(), Gone> {
        self.send_frame(Message::Ping(Bytes::new())).await
    }

    async fn send_frame(&mut self, message: Message) -> Result<(), Gone> {
        self.0.send(message).await.map_err(|_| Gone)
    }

    /// Closes the session and waits, within a deadline, until the client has read everything.
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
            if self.send_frame(Message::Close(Some(frame))).await.is_ok() {
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
    /// Returns the client's next message. The inner error is the reason for which a message is
    /// invalid; the session continues.
    pub(super) async fn next<T: Incoming>(&mut self) -> Result<Result<T, String>, Gone> {
        loop {
            match self.0.next().await {
                Some(Ok(Message::Text(text))) => {
                    return Ok(check_length(text.len())
                        .and_then(|()| serde_json::from_str(&text).map_err(|e| e.to_string())));
                }
                Some(Ok(Message::Binary(bytes))) => {
                    let message = check_length(bytes.len()).and_then(|()| {
                        T::from_binary(bytes).ok_or_else(|| {
                            "expected JSON in a text frame, got a binary frame".to_owned()
                        })
                    });
                    return Ok(message);
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Gone),
            }
        }
    }

    /// Returns the first message, which determines the session.
    pub(super) async fn first<T: Incoming>(&mut self) -> Result<Result<T, String>, Gone> {
        tokio::time::timeout(FIRST_MESSAGE_TIMEOUT, self.next())
            .await
            .unwrap_or_else(|_| Ok(Err("timed out waiting for the message".to_owned())))
    }
}

fn check_length(bytes: usize) -> Result<(), String> {
    if bytes > MAX_MESSAGE_BYTES {
        return Err(format!(
            "the message exceeds the limit of {MAX_MESSAGE_BYTES} bytes"
        ));
    }
    Ok(())
}
