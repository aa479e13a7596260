//! WebSocket client.

use futures::{SinkExt, StreamExt};
use reqwest::StatusCode;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Error, Message, client::IntoClientRequest},
};

use super::{Control, GENEROUS};

/// Open WebSocket.
pub(crate) struct Socket(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Socket {
    pub(crate) async fn open(control: &Control, path: &str) -> Self {
        match Self::try_open(control, path, Some(control.key())).await {
            Ok(socket) => socket,
            Err((status, body)) => panic!("{status} {body}"),
        }
    }

    /// Opens a WebSocket. A rejection is returned as status and body.
    pub(crate) async fn try_open(
        control: &Control,
        path: &str,
        key: Option<&str>,
    ) -> Result<Self, (StatusCode, Value)> {
        let url = format!("ws://{}{path}", control.address());
        let mut request = url.into_client_request().unwrap();
        if let Some(key) = key {
            let key = key.parse().unwrap();
            request.headers_mut().insert("X-API-Key", key);
        }
        match tokio::time::timeout(GENEROUS, connect_async(request))
            .await
            .unwrap()
        {
            Ok((socket, _)) => Ok(Self(socket)),
            Err(Error::Http(response)) => {
                let status = StatusCode::from_u16(response.status().as_u16()).unwrap();
                let body = response.body().as_deref().unwrap_or_default();
                Err((status, serde_json::from_slice(body).unwrap_or_default()))
            }
            Err(error) => panic!("{error}"),
        }
    }

    pub(crate) async fn send(&mut self, message: Value) {
        self.send_text(message.to_string()).await;
    }

    pub(crate) async fn send_text(&mut self, text: String) {
        self.0.send(Message::text(text)).await.unwrap();
    }

    pub(crate) async fn send_binary(&mut self, bytes: Vec<u8>) {
        self.0.send(Message::binary(bytes)).await.unwrap();
    }

    /// Returns at least this many bytes from the next frames, which must be binary.
    pub(crate) async fn binary(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let message = tokio::time::timeout(GENEROUS, self.0.next()).await;
            match message.expect("a frame in time") {
                Some(Ok(Message::Binary(more))) => bytes.extend_from_slice(&more),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                other => panic!("{other:?}"),
            }
        }
        bytes
    }

    /// Returns the next message, which must be JSON; `None` if the server has closed.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        loop {
            let message = tokio::time::timeout(GENEROUS, self.0.next()).await;
            match message.expect("a message in time") {
                Some(Ok(Message::Text(text))) => {
                    return Some(serde_json::from_str(&text).unwrap());
                }
                Some(Ok(Message::Close(_))) | None => return None,
                Some(Ok(Message::Binary(bytes))) => panic!("unexpected binary frame: {bytes:?}"),
                Some(Ok(_)) => {}
                Some(Err(error)) => panic!("{error}"),
            }
        }
    }

    /// Returns the next message, which must be of this type.
    pub(crate) async fn expect(&mut self, kind: &str) -> Value {
        let message = self.next().await.unwrap_or_default();
        assert_eq!(message["type"], kind, "{message}");
        message
    }

    /// Returns all messages until the server closes.
    pub(crate) async fn rest(&mut self) -> Vec<Value> {
        let mut all = Vec::new();
        while let Some(message) = self.next().await {
            all.push(message);
        }
        all
    }
}
