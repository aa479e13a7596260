//! WebSocket client.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Message, client::IntoClientRequest as _},
};

use crate::Service;

/// Open WebSocket that carries JSON.
pub struct Socket(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Socket {
    /// Opens the WebSocket of a path.
    ///
    /// # Errors
    /// The server rejects the connection.
    pub async fn open(service: &Service, path: &str) -> Result<Self> {
        let url = format!("ws://{}{path}", service.listen());
        let mut request = url.into_client_request()?;
        request
            .headers_mut()
            .insert("X-API-Key", service.key().parse()?);
        let (socket, _) = connect_async(request).await?;
        Ok(Self(socket))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// The connection is lost.
    pub async fn send(&mut self, message: &Value) -> Result<()> {
        Ok(self.0.send(Message::text(message.to_string())).await?)
    }

    /// Returns the next JSON message; `None` when the server closed the connection.
    ///
    /// # Errors
    /// No message arrives within two minutes, or the message is not JSON.
    pub async fn next(&mut self) -> Result<Option<Value>> {
        loop {
            let message = tokio::time::timeout(Duration::from_secs(120), self.0.next())
                .await
                .context("no message within 120 s")?;
            match message {
                None | Some(Ok(Message::Close(_))) => return Ok(None),
                Some(Ok(Message::Text(text))) => return Ok(Some(serde_json::from_str(&text)?)),
                Some(Ok(_)) => {}
                Some(Err(error)) => bail!(error),
            }
        }
    }

    /// Returns the next message of a type and skips other messages.
    ///
    /// # Errors
    /// The server closes the connection first, or sends an error message.
    pub async fn next_of(&mut self, kind: &str) -> Result<Value> {
        while let Some(message) = self.next().await? {
            if message["type"] == kind {
                return Ok(message);
            }
            if message["type"] == "error" {
                bail!("{message}");
            }
        }
        bail!("the server closed the connection before `{kind}`")
    }
}
