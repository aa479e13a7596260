//! The two WebSockets of a sandbox: `exec/stream` (a program's output as it comes) and `pty` (a terminal).
//!
//! One JSON message a frame. Never buffers more than one message: a slow reader here slows the program in the sandbox.

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
use wrenn_proto::SandboxId;

use super::{Client, ClientError};

/// Until the server has accepted the WebSocket.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);

/// A message that cannot be sent for this long means that the server hangs.
const SEND_TIMEOUT: Duration = Duration::from_secs(60);

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamKind {
    /// `exec/stream`.
    Exec,
    /// `pty`.
    Pty,
}

/// First message: what to run.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Start {
    /// Program; empty: the server's choice (a shell, of `pty`).
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) cmd: String,
    /// Its arguments.
    pub(crate) args: Vec<String>,
    /// Environment added to the sandbox's.
    pub(crate) envs: BTreeMap<String, String>,
    /// Working directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cwd: Option<String>,
    /// User to run as.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) user: Option<String>,
    /// Seconds until it is killed; 0 means never. Of `exec/stream` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) timeout_sec: Option<i64>,
    /// Whether input will follow. Of `exec/stream` only.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) stdin: bool,
    /// Columns of the terminal. Of `pty` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cols: Option<u16>,
    /// Rows of the terminal. Of `pty` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rows: Option<u16>,
}

/// What a client says.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Said<'a> {
    Start(&'a Start),
    Stdin { data: String },
    CloseStdin,
    Stop,
    Input { data: String },
    Resize { cols: u16, rows: u16 },
    Kill,
}

/// What the server says, as it stands on the wire.
#[derive(Debug, Deserialize)]
struct Heard {
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
    /// Whether an `error` ends the stream; one that does not say so does.
    #[serde(default = "yes")]
    fatal: bool,
}

fn yes() -> bool {
    true
}

/// What happened in the sandbox.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The program runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// Bytes of standard output, or of the terminal.
    Stdout(Vec<u8>),
    /// Bytes of standard error.
    Stderr(Vec<u8>),
    /// The program ended.
    Exit {
        /// Its exit code; -1 if a signal ended it.
        code: i32,
        /// How it ended other than by exit.
        error: Option<String>,
    },
}

type Inner = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// One open WebSocket. Its halves are apart because they wait apart: a program that does not take its input may wait
/// for its output to be read.
pub(crate) struct Socket {
    /// What the user says to the program.
    pub(crate) sender: Sender,
    /// What the program says.
    pub(crate) receiver: Receiver,
}

/// The half towards the sandbox.
pub(crate) struct Sender {
    inner: SplitSink<Inner, Message>,
    kind: StreamKind,
}

/// The half from the sandbox.
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
        let url = self.url(path).to_string().replacen("http://", "ws://", 1);
        let mut request = url.into_client_request().map_err(socket_error)?;
        let key = HeaderValue::from_str(&self.key)
            .map_err(|_| ClientError::Stream("the API key holds strange characters".into()))?;
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
        sender.say(&Said::Start(start)).await?;
        Ok(Socket {
            sender,
            receiver: Receiver { inner: stream },
        })
    }

    /// A refused upgrade carries the same error body as any other call.
    fn open_error(&self, error: tungstenite::Error) -> ClientError {
        match error {
            tungstenite::Error::Http(answer) => {
                let status = StatusCode::from_u16(answer.status().as_u16())
                    .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                ClientError::refused(status, answer.body().as_deref().unwrap_or_default())
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
    /// What happens next; `None` after the server has closed the stream. May be dropped and called again.
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
    /// Input for the program. Waits as long as the program does not take what it was given before.
    pub(crate) async fn input(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        let data = BASE64.encode(bytes);
        let said = match self.kind {
            StreamKind::Exec => Said::Stdin { data },
            StreamKind::Pty => Said::Input { data },
        };
        self.send(&said).await
    }

    /// No more input will come.
    pub(crate) async fn close_input(&mut self) -> Result<(), ClientError> {
        self.send(&Said::CloseStdin).await
    }

    /// The terminal has a new size.
    pub(crate) async fn resize(&mut self, cols: u16, rows: u16) -> Result<(), ClientError> {
        self.say(&Said::Resize { cols, rows }).await
    }

    /// Ends the program.
    pub(crate) async fn kill(&mut self) -> Result<(), ClientError> {
        let said = match self.kind {
            StreamKind::Exec => Said::Stop,
            StreamKind::Pty => Said::Kill,
        };
        self.say(&said).await
    }

    /// Sends what a server that works takes at once.
    async fn say(&mut self, said: &Said<'_>) -> Result<(), ClientError> {
        tokio::time::timeout(SEND_TIMEOUT, self.send(said))
            .await
            .map_err(|_| ClientError::Stalled {
                seconds: SEND_TIMEOUT.as_secs(),
            })?
    }

    async fn send(&mut self, said: &Said<'_>) -> Result<(), ClientError> {
        let text = serde_json::to_string(said).map_err(ClientError::Answer)?;
        self.inner
            .send(Message::text(text))
            .await
            .map_err(socket_error)
    }
}

/// Reads one message; `None` if it says nothing that concerns a user.
fn read(text: &str) -> Result<Option<Event>, ClientError> {
    let heard: Heard = serde_json::from_str(text).map_err(ClientError::Answer)?;
    Ok(Some(match heard.kind.as_str() {
        "start" | "started" => Event::Started {
            pid: heard.pid.unwrap_or(0),
        },
        "stdout" => Event::Stdout(heard.bytes()?),
        "output" => Event::Stdout(decode_base64(&heard.data)?),
        "stderr" => Event::Stderr(heard.bytes()?),
        "exit" => Event::Exit {
            code: heard.exit_code.unwrap_or(-1),
            error: heard.error,
        },
        "error" if heard.fatal => return Err(ClientError::Stream(heard.data)),
        // `ping`, whatever a later server adds, and an error after which the program runs on: it did not take its input.
        _ => return Ok(None),
    }))
}

impl Heard {
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
        .map_err(|e| ClientError::Stream(format!("output that is not base64: {e}")))
}

fn socket_error(error: tungstenite::Error) -> ClientError {
    let text: Cow<'static, str> = match error {
        tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => {
            "the server closed it".into()
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
    fn an_exit_carries_its_code_and_what_else_ended_it() {
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
    fn unknown_messages_are_passed_over_and_broken_ones_are_errors() {
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
    fn a_start_says_no_more_than_was_asked() {
        let start = Start {
            cmd: "true".into(),
            ..Start::default()
        };
        assert_eq!(
            serde_json::to_string(&Said::Start(&start)).expect("plain data"),
            r#"{"type":"start","cmd":"true","args":[],"envs":{}}"#
        );
    }
}
