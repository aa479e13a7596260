//! The two WebSockets of a sandbox: `exec/stream` (streaming output of a program) and `pty` (a
//! terminal).
//!
//! Each frame contains one JSON message. Never buffers more than one message: a slow reader slows
//! down the program in the sandbox.

use std::{borrow::Cow, collections::BTreeMap, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use futures::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use reqwest::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{self, Message, client::IntoClientRequest, http::HeaderValue},
};
use wrenn_model::SandboxId;

use super::{Client, ClientError};

/// Time within which the server must accept the WebSocket.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);

/// Time after which a message that cannot be sent means that the server hangs.
const SEND_TIMEOUT: Duration = Duration::from_secs(60);

/// Endpoint of a WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamKind {
    /// `exec/stream`.
    Exec,
    /// `pty`.
    Pty,
}

/// First message: the program to run.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Start {
    /// Program. If empty, the server chooses (`pty` runs a shell).
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) cmd: String,
    /// Arguments of the program.
    pub(crate) args: Vec<String>,
    /// Environment variables, added to those of the sandbox.
    pub(crate) envs: BTreeMap<String, String>,
    /// Working directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cwd: Option<String>,
    /// User to run as.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) user: Option<String>,
    /// Timeout in seconds after which the program is killed; 0: none. `exec/stream` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) timeout_sec: Option<i64>,
    /// True if input follows. `exec/stream` only.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) stdin: bool,
    /// Columns of the terminal. `pty` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cols: Option<u16>,
    /// Rows of the terminal. `pty` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rows: Option<u16>,
}

/// Messages from the client.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ClientMessage<'a> {
    Start(&'a Start),
    Stdin { data: String },
    CloseStdin,
    Stop,
    Input { data: String },
    Resize { cols: u16, rows: u16 },
    Kill,
}

/// Message from the server, as sent on the wire.
#[derive(Debug, Deserialize)]
struct ServerMessage {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    pid: Option<u32>,
    #[serde(default)]
    data: String,
    #[serde(default)]
    encoding: Option<String>,
    #[serde(default)]
    exit_code: Option<i32>,
    #[serde(default)]
    error: Option<String>,
    /// True if an `error` ends the stream, which is the default.
    #[serde(default = "yes")]
    fatal: bool,
}

fn yes() -> bool {
    true
}

/// Events of a program in the sandbox.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The program has started.
    Started {
        /// Process id in the guest.
        pid: u32,
    },
    /// Bytes of standard output, or of the terminal.
    Stdout(Vec<u8>),
    /// Bytes of standard error.
    Stderr(Vec<u8>),
    /// The program has ended.
    Exit {
        /// Exit code; -1 if a signal ended the program.
        code: i32,
        /// Reason of an end other than by exit.
        error: Option<String>,
    },
}

type Inner = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Open WebSocket, split into halves that can wait independently: a program that does not read its
/// input may be waiting for its output to be read.
pub(crate) struct Socket {
    /// Half that sends to the program.
    pub(crate) sender: Sender,
    /// Half that receives from the program.
    pub(crate) receiver: Receiver,
}

/// Half that sends to the sandbox.
pub(crate) struct Sender {
    inner: SplitSink<Inner, Message>,
    kind: StreamKind,
}

/// Half that receives from the sandbox.
pub(crate) struct Receiver {
    inner: SplitStream<Inner>,
}

impl Client {
    /// Opens a stream and starts the program.
    pub(crate) async fn open(
        &self,
        id: &SandboxId,
        kind: StreamKind,
        start: &Start,
    ) -> Result<Socket, ClientError> {
        let path: &[&str] = match kind {
            StreamKind::Exec => &["sandboxes", id.as_str(), "exec", "stream"],
            StreamKind::Pty => &["sandboxes", id.as_str(), "pty"],
        };
        let mut url = self.url(path).to_string().replacen("http://", "ws://", 1);
        if kind == StreamKind::Pty {
            // Servers of release 0.1.0 ignore the query, and have no other form.
            url.push_str("?output=base64");
        }
        let mut request = url.into_client_request().map_err(socket_error)?;
        let key = HeaderValue::from_str(&self.key)
            .map_err(|_| ClientError::Stream("the API key contains invalid characters".into()))?;
        request.headers_mut().insert("X-API-Key", key);
        let opening = tokio_tungstenite::connect_async(request);
        let (inner, _) = tokio::time::timeout(OPEN_TIMEOUT, opening)
            .await
            .map_err(|_| ClientError::TimedOut {
                url: self.base.to_string(),
            })?
            .map_err(|e| self.open_error(e))?;
        let (sink, stream) = inner.split();
        let mut sender = Sender { inner: sink, kind };
        sender.send_in_time(&ClientMessage::Start(start)).await?;
        Ok(Socket {
            sender,
            receiver: Receiver { inner: stream },
        })
    }

    /// Converts the error of opening a stream. A rejected upgrade has the same error body as any
    /// other call.
    fn open_error(&self, error: tungstenite::Error) -> ClientError {
        match error {
            tungstenite::Error::Http(answer) => {
                let status = StatusCode::from_u16(answer.status().as_u16())
                    .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                ClientError::rejected(status, answer.body().as_deref().unwrap_or_default())
            }
            tungstenite::Error::Io(e) => ClientError::Unreachable {
                url: self.base.as_str().trim_end_matches('/').to_owned(),
                cause: e.to_string(),
            },
            other => socket_error(other),
        }
    }
}

impl Receiver {
    /// Returns the next event, or `None` after the server has closed the stream. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            let Some(message) = self.inner.next().await else {
                return Ok(None);
            };
            let text = match message.map_err(socket_error)? {
                Message::Text(text) => text,
                Message::Close(_) => return Ok(None),
                _ => continue,
            };
            if let Some(event) = read(&text)? {
                return Ok(Some(event));
            }
        }
    }
}

impl Sender {
    /// Sends input to the program. Waits as long as the program does not read its earlier input.
    pub(crate) async fn input(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        let data = BASE64.encode(bytes);
        let message = match self.kind {
            StreamKind::Exec => ClientMessage::Stdin { data },
            StreamKind::Pty => ClientMessage::Input { data },
        };
        self.send(&message).await
    }

    /// Closes the program's input.
    pub(crate) async fn close_input(&mut self) -> Result<(), ClientError> {
        self.send(&ClientMessage::CloseStdin).await
    }

    /// Reports a new size of the terminal.
    pub(crate) async fn resize(&mut self, cols: u16, rows: u16) -> Result<(), ClientError> {
        self.send_in_time(&ClientMessage::Resize { cols, rows })
            .await
    }

    /// Terminates the program.
    pub(crate) async fn kill(&mut self) -> Result<(), ClientError> {
        let message = match self.kind {
            StreamKind::Exec => ClientMessage::Stop,
            StreamKind::Pty => ClientMessage::Kill,
        };
        self.send_in_time(&message).await
    }

    /// Sends a message that a responsive server accepts at once.
    async fn send_in_time(&mut self, message: &ClientMessage<'_>) -> Result<(), ClientError> {
        tokio::time::timeout(SEND_TIMEOUT, self.send(message))
            .await
            .map_err(|_| ClientError::Stalled {
                seconds: SEND_TIMEOUT.as_secs(),
            })?
    }

    async fn send(&mut self, message: &ClientMessage<'_>) -> Result<(), ClientError> {
        let text = serde_json::to_string(message).map_err(ClientError::Answer)?;
        self.inner
            .send(Message::text(text))
            .await
            .map_err(socket_error)
    }
}

/// Parses one message; `None` if it is not relevant to the user.
fn read(text: &str) -> Result<Option<Event>, ClientError> {
    let message: ServerMessage = serde_json::from_str(text).map_err(ClientError::Answer)?;
    Ok(Some(match message.kind.as_str() {
        "start" | "started" => Event::Started {
            pid: message.pid.unwrap_or(0),
        },
        "stdout" => Event::Stdout(message.bytes()?),
        "output" => Event::Stdout(decode_base64(&message.data)?),
        "stderr" => Event::Stderr(message.bytes()?),
        "exit" => Event::Exit {
            code: message.exit_code.unwrap_or(-1),
            error: message.error,
        },
        "error" if message.fatal => {
            let text = message.data;
            return Err(match message.exit_code {
                Some(exit_code) => ClientError::NotExecuted {
                    message: text,
                    exit_code,
                },
                None => ClientError::Stream(text),
            });
        }
        // `ping`, message types of later servers, and non-fatal errors: the program did not read
        // its input but keeps running.
        _ => return Ok(None),
    }))
}

impl ServerMessage {
    fn bytes(self) -> Result<Vec<u8>, ClientError> {
        match self.encoding.as_deref() {
            Some("base64") => decode_base64(&self.data),
            _ => Ok(self.data.into_bytes()),
        }
    }
}

fn decode_base64(data: &str) -> Result<Vec<u8>, ClientError> {
    BASE64
        .decode(data)
        .map_err(|e| ClientError::Stream(format!("invalid base64 in the output: {e}")))
}

fn socket_error(error: tungstenite::Error) -> ClientError {
    let text: Cow<'static, str> = match error {
        tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => {
            "the server closed the connection".into()
        }
        tungstenite::Error::Io(e) => e.to_string().into(),
        other => other.to_string().into(),
    };
    ClientError::Stream(text.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_read_as_bytes_whatever_its_encoding() {
        let event = |text| read(text).expect("well formed");
        assert_eq!(
            event(r#"{"type":"stdout","data":"a\n"}"#),
            Some(Event::Stdout(b"a\n".to_vec()))
        );
        assert_eq!(
            event(r#"{"type":"stderr","data":"/w==","encoding":"base64"}"#),
            Some(Event::Stderr(vec![0xff]))
        );
        assert_eq!(
            event(r#"{"type":"output","data":"/w=="}"#),
            Some(Event::Stdout(vec![0xff]))
        );
    }

    #[test]
    fn exit_has_its_code_and_error() {
        assert_eq!(
            read(r#"{"type":"exit","exit_code":-1,"error":"signal: killed"}"#)
                .expect("well formed"),
            Some(Event::Exit {
                code: -1,
                error: Some("signal: killed".into())
            })
        );
    }

    #[test]
    fn unknown_messages_are_ignored_and_invalid_ones_are_errors() {
        assert!(matches!(read(r#"{"type":"ping"}"#), Ok(None)));
        assert!(read("{").is_err());
        assert!(read(r#"{"type":"output","data":"%"}"#).is_err());
        assert!(matches!(
            read(r#"{"type":"error","data":"no such program"}"#),
            Err(ClientError::Stream(text)) if text == "no such program"
        ));
        let survived = r#"{"type":"error","data":"broken pipe","fatal":false}"#;
        assert!(matches!(read(survived), Ok(None)));
    }

    #[test]
    fn fatal_error_of_a_program_that_cannot_run_has_an_exit_code() {
        let missing = r#"{"type":"error","data":"no such program","fatal":true,"code":"invalid_request","exit_code":127}"#;
        let error = read(missing).expect_err("fatal");
        assert_eq!(error.to_string(), "no such program");
        assert_eq!(error.exit_code(), Some(127));
        let other = r#"{"type":"error","data":"cwd","fatal":true,"code":"invalid_request"}"#;
        assert_eq!(read(other).expect_err("fatal").exit_code(), None);
    }

    #[test]
    fn start_message_has_only_the_given_fields() {
        let start = Start {
            cmd: "true".into(),
            ..Start::default()
        };
        assert_eq!(
            serde_json::to_string(&ClientMessage::Start(&start)).expect("plain data"),
            r#"{"type":"start","cmd":"true","args":[],"envs":{}}"#
        );
    }
}
