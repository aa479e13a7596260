//! Commands with streamed output, over a WebSocket.
//!
//! First message of the client. All fields but `type` and `cmd` are optional:
//!
//! ```text
//! {"type":"start","cmd":TEXT,"args":[TEXT],"envs":{TEXT:TEXT},"cwd":TEXT,"user":TEXT,
//!  "timeout_sec":N,"tag":TEXT,"stdin":BOOL}
//! ```
//!
//! | later message of the client | meaning |
//! |---|---|
//! | `{"type":"stdin","data":BASE64}` | input; only if `stdin` was true |
//! | `{"type":"close_stdin"}` | end of the input; only if `stdin` was true |
//! | `{"type":"stop"}` | SIGTERM, then SIGKILL after 5 s or at a second `stop` |
//! | `{"type":"pong"}` | no effect |
//!
//! | message of the server | meaning |
//! |---|---|
//! | `{"type":"start","pid":N}` | the process runs |
//! | `{"type":"stdout","data":TEXT}` | with `"encoding":"base64"` if not UTF-8 |
//! | `{"type":"stderr","data":TEXT}` | as `stdout` |
//! | `{"type":"exit","exit_code":N}` | `"error"` unless it exited by itself; the server closes |
//! | `{"type":"error","data":TEXT,"fatal":BOOL,"code":CODE}` | failure; the server closes after a fatal one |
//!
//! `code` is that of error responses. A fatal error also has `"exit_code"` (127 or 126) if the
//! program does not exist or cannot be executed. Output that no client took and that was dropped is
//! an error that is not fatal, with the code `output_lost` and `"lost_bytes":N`, at its place in
//! the output.

use std::collections::BTreeMap;

use axum::{
    extract::{State, ws::WebSocket},
    response::Response,
};
use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use wrenn_model::SandboxId;
use wrenn_proto::rpc::process::{
    StartRequest,
    process_event::{Event, data_event::Output},
};

use super::{
    controls::{Controls, InputKind, Kill},
    process,
    session::{self, Failure, Protocol, Session},
    socket::{ApiSocket, Incoming, Outgoing, split},
    utf8::{Piece, TextStream},
};
use crate::{
    app::AppState,
    error::{ApiError, Code},
    extract::SandboxPath,
    openapi::{CommonErrors, HostErrors, SandboxErrors},
    validate,
};

/// Runs a command and streams its output over a WebSocket.
///
/// Messages are JSON objects. The first message of the client is `{"type":"start","cmd":…}` with
/// the fields of `exec`. With `"stdin":true` in it, later messages `{"type":"stdin","data":BASE64}`
/// and `{"type":"close_stdin"}` write to the command's input. `{"type":"stop"}` ends the command.
///
/// The server sends `start` with `pid`, `stdout` and `stderr` with `data` (and `encoding`: `base64`
/// if the data is not UTF-8), `exit` with `exit_code`, and `error` with `data`, `fatal` and `code`
/// (and `exit_code`: 127 or 126, if the program does not exist or cannot be executed). An `error`
/// with the code `output_lost` and `lost_bytes` marks dropped output.
///
/// The command ends when its own process ends, even if processes that it has started keep its
/// output open. It keeps running if the client disconnects. A client that takes no output for 5
/// minutes gets a fatal `error` with the code `timeout`, and can connect again.
#[utoipa::path(
    get, path = "/{id}/exec/stream", tag = "processes", operation_id = "exec_stream",
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 101, description = "The WebSocket is open."), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn exec_stream(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    socket: ApiSocket,
) -> Result<Response, ApiError> {
    socket.open(app, id, run).await
}

/// Message of a client.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum ClientMessage {
    Start(Start),
    Stdin { data: String },
    CloseStdin,
    Stop,
    Pong,
}

impl Incoming for ClientMessage {
    fn from_binary(_: Bytes) -> Option<Self> {
        None
    }
}

/// Command to run.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Start {
    cmd: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    envs: BTreeMap<String, String>,
    cwd: Option<String>,
    user: Option<String>,
    timeout_sec: Option<i64>,
    tag: Option<String>,
    #[serde(default)]
    stdin: bool,
}

/// Message of the server.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum ServerMessage {
    Start {
        pid: u32,
    },
    Stdout(Data),
    Stderr(Data),
    Exit {
        exit_code: i32,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    Error(Failure),
}

impl Outgoing for ServerMessage {
    fn as_binary(&self) -> Option<Bytes> {
        None
    }
}

/// Piece of output.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Data {
    data: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    encoding: Option<&'static str>,
}

impl From<Piece> for Data {
    fn from(piece: Piece) -> Self {
        match piece {
            Piece::Text(data) => Self {
                data,
                encoding: None,
            },
            Piece::Base64(data) => Self {
                data,
                encoding: Some("base64"),
            },
        }
    }
}

/// Protocol of `exec/stream` and `processes/…/stream`.
#[derive(Debug, Default)]
pub(super) struct ExecProtocol {
    stdout: TextStream,
    stderr: TextStream,
}

impl ExecProtocol {
    /// Returns what is left of both streams, and a message after it.
    fn finish(&mut self, last: ServerMessage) -> Vec<ServerMessage> {
        let stdout = self.stdout.finish().map(Data::from);
        let stderr = self.stderr.finish().map(Data::from);
        let stdout = stdout.map(ServerMessage::Stdout).into_iter();
        let stderr = stderr.map(ServerMessage::Stderr);
        stdout.chain(stderr).chain([last]).collect()
    }
}

impl Protocol for ExecProtocol {
    const INPUT: InputKind = InputKind::Stdin;
    const KILL: Kill = Kill::Politely;
    type ClientMessage = ClientMessage;
    type ServerMessage = ServerMessage;
    type Listener = ();

    fn listener(&self) {}

    async fn on_message(
        (): &(),
        message: ClientMessage,
        controls: &Controls,
    ) -> Result<(), String> {
        match message {
            ClientMessage::Start(_) => {
                Err("unexpected `start`: the session has already started".to_owned())
            }
            ClientMessage::Stdin { data } => {
                let bytes = BASE64
                    .decode(data)
                    .map_err(|e| format!("`data` is not valid base64: {e}"))?;
                controls.input(bytes).await;
                Ok(())
            }
            ClientMessage::CloseStdin => {
                controls.close_input();
                Ok(())
            }
            ClientMessage::Stop => {
                controls.kill();
                Ok(())
            }
            ClientMessage::Pong => Ok(()),
        }
    }

    async fn ready(&mut self) {}

    fn encode(&mut self, event: Event) -> Vec<ServerMessage> {
        match event {
            Event::Start(start) => vec![ServerMessage::Start { pid: start.pid }],
            Event::Data(data) => match data.output {
                Some(Output::Stdout(bytes) | Output::Pty(bytes)) => {
                    let piece = self.stdout.push(&bytes);
                    piece
                        .map(|p| ServerMessage::Stdout(p.into()))
                        .into_iter()
                        .collect()
                }
                Some(Output::Stderr(bytes)) => {
                    let piece = self.stderr.push(&bytes);
                    piece
                        .map(|p| ServerMessage::Stderr(p.into()))
                        .into_iter()
                        .collect()
                }
                None => Vec::new(),
            },
            Event::End(end) => self.finish(ServerMessage::Exit {
                exit_code: end.exit_code,
                error: session::other_end(&end),
            }),
            Event::Lost(lost) => {
                let mark = Failure::output_lost(lost.bytes);
                self.finish(ServerMessage::Error(mark))
            }
            Event::Keepalive(_) => Vec::new(),
        }
    }

    fn failure(failure: Failure) -> ServerMessage {
        ServerMessage::Error(failure)
    }

    fn ping() -> Option<ServerMessage> {
        None
    }
}

async fn run(app: AppState, id: SandboxId, socket: WebSocket) {
    let (outbox, mut inbox) = split(socket);
    let Ok(first) = inbox.first::<ClientMessage>().await else {
        return;
    };
    let opened = match first {
        Ok(ClientMessage::Start(start)) => begin(&app, &id, start).await,
        Ok(_) => Err(ApiError::new(
            Code::InvalidRequest,
            "the first message must be `start`",
        )),
        Err(why) => Err(ApiError::new(
            Code::InvalidRequest,
            format!("the first message must be `start`: {why}"),
        )),
    };
    session::serve(&app, outbox, inbox, opened).await;
}

async fn begin(
    app: &AppState,
    id: &SandboxId,
    start: Start,
) -> Result<Session<ExecProtocol>, ApiError> {
    let tag = start.tag.unwrap_or_else(|| process::new_tag("proc"));
    validate::check_tag("tag", &tag)?;
    validate::check_command(&start.cmd, &start.args)?;
    validate::check_envs(&start.envs)?;
    validate::check_place(start.cwd.as_deref(), start.user.as_deref())?;
    let timeout_sec = validate::check_exec_timeout(start.timeout_sec, 0)?;
    let request = StartRequest {
        process: process::config(start.cmd, start.args, start.envs, start.cwd).into(),
        tag: Some(tag),
        stdin: Some(start.stdin),
        ..Default::default()
    };
    let user = start.user.unwrap_or_default();
    Session::start(
        app,
        id,
        request,
        &user,
        timeout_sec,
        ExecProtocol::default(),
    )
    .await
}
