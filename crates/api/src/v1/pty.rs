//! Terminals, over a WebSocket.
//!
//! First message of the client. It starts a terminal (all fields but `type` are optional) or
//! reconnects to a running one:
//!
//! ```text
//! {"type":"start","cmd":TEXT,"args":[TEXT],"envs":{TEXT:TEXT},"cwd":TEXT,"user":TEXT,
//!  "cols":N,"rows":N}
//! {"type":"connect","tag":TEXT}
//! ```
//!
//! | later message of the client | meaning |
//! |---|---|
//! | `{"type":"input","data":BASE64}` | keyboard input |
//! | `{"type":"resize","cols":N,"rows":N}` | new size of the terminal |
//! | `{"type":"kill"}` | SIGKILL, even while input is queued |
//!
//! | message of the server | meaning |
//! |---|---|
//! | `{"type":"started","tag":TEXT,"pid":N}` | the terminal runs |
//! | `{"type":"output","data":BASE64}` | output |
//! | `{"type":"exit","exit_code":N}` | `"error"` unless it exited by itself; the server closes |
//! | `{"type":"error","data":TEXT,"fatal":BOOL,"code":CODE}` | failure, as in `exec_stream` |
//! | `{"type":"ping"}` | every 30 s |
//!
//! The terminal has no idle limit and outlives its client.

use std::collections::BTreeMap;

use axum::{
    extract::{State, ws::WebSocket},
    response::Response,
};
use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use serde::{Deserialize, Serialize};
use wrenn_model::SandboxId;
use wrenn_proto::rpc::process::{
    PTY, StartRequest,
    process_event::{Event, data_event::Output},
    pty::Size,
};

use super::{
    controls::{Controls, InputKind, Kill},
    process::{self, Selector},
    session::{self, Failure, Protocol, Session},
    socket::{ApiSocket, split},
};
use crate::{
    app::AppState,
    error::{ApiError, Code},
    extract::SandboxPath,
    openapi::{CommonErrors, HostErrors, SandboxErrors},
    validate,
};

/// Program of a terminal whose client names none.
const DEFAULT_SHELL: &str = "/bin/bash";

/// Size of a terminal whose client gives none, in columns and rows.
const DEFAULT_COLS: u32 = 80;
const DEFAULT_ROWS: u32 = 24;

/// Maximum number of columns or rows; the kernel stores 16 bits.
const MAX_SIZE: u32 = u16::MAX as u32;

/// Opens a terminal, or reconnects to one, over a WebSocket.
///
/// Messages are JSON objects. The first message of the client is
/// `{"type":"start","cols":80,"rows":24}`, with optional `cmd` (default `/bin/bash`), `args`,
/// `envs`, `cwd` and `user`, or `{"type":"connect","tag":…}`. Later messages are `input` with
/// `data` in base64, `resize` with `cols` and `rows`, and `kill`.
///
/// The server sends `started` with `tag` and `pid`, `output` with `data` in base64, `exit` with
/// `exit_code`, `error` as in `exec/stream`, and `ping` every 30 s. A terminal outlives its client,
/// which can reconnect with the `tag`. It ends when its own process ends; `kill` ends all its jobs.
#[utoipa::path(
    get, path = "/{id}/pty", tag = "processes", operation_id = "pty",
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 101, description = "The WebSocket is open."), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn pty(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    socket: ApiSocket,
) -> Result<Response, ApiError> {
    socket.open(app, id, run).await
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ClientMessage {
    Start(Start),
    Connect { tag: String },
    Input { data: String },
    Resize { cols: u32, rows: u32 },
    Kill,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Start {
    cmd: Option<String>,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    envs: BTreeMap<String, String>,
    cwd: Option<String>,
    user: Option<String>,
    cols: Option<u32>,
    rows: Option<u32>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ServerMessage {
    Started {
        tag: String,
        pid: u32,
    },
    Output {
        data: String,
    },
    Exit {
        exit_code: i32,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    Error(Failure),
    Ping,
}

/// Protocol of `pty`.
struct PtyProtocol {
    tag: String,
}

impl Protocol for PtyProtocol {
    const INPUT: InputKind = InputKind::Pty;
    const KILL: Kill = Kill::AtOnce;
    type ClientMessage = ClientMessage;
    type ServerMessage = ServerMessage;

    async fn on_message(message: ClientMessage, controls: &Controls) -> Result<(), String> {
        match message {
            ClientMessage::Start(_) | ClientMessage::Connect { .. } => {
                Err("unexpected `start` or `connect`: the session has already started".to_owned())
            }
            ClientMessage::Input { data } => {
                let bytes = BASE64
                    .decode(data)
                    .map_err(|e| format!("`data` is not valid base64: {e}"))?;
                controls.input(bytes).await;
                Ok(())
            }
            ClientMessage::Resize { cols, rows } => {
                let size = size(Some(cols), Some(rows)).map_err(|error| error.message)?;
                controls.resize(size.cols, size.rows);
                Ok(())
            }
            ClientMessage::Kill => {
                controls.kill();
                Ok(())
            }
        }
    }

    fn encode(&mut self, event: Event) -> Vec<ServerMessage> {
        match event {
            Event::Start(start) => vec![ServerMessage::Started {
                tag: self.tag.clone(),
                pid: start.pid,
            }],
            Event::Data(data) => match data.output {
                Some(Output::Pty(bytes) | Output::Stdout(bytes) | Output::Stderr(bytes)) => {
                    vec![ServerMessage::Output {
                        data: BASE64.encode(bytes),
                    }]
                }
                None => Vec::new(),
            },
            Event::End(end) => vec![ServerMessage::Exit {
                exit_code: end.exit_code,
                error: session::other_end(&end),
            }],
            Event::Lost(lost) => vec![ServerMessage::Error(Failure::output_lost(lost.bytes))],
            Event::Keepalive(_) => Vec::new(),
        }
    }

    fn failure(failure: Failure) -> ServerMessage {
        ServerMessage::Error(failure)
    }

    fn ping() -> Option<ServerMessage> {
        Some(ServerMessage::Ping)
    }
}

fn size(cols: Option<u32>, rows: Option<u32>) -> Result<Size, ApiError> {
    let checked = |name, value: Option<u32>, default| {
        let value = value.unwrap_or(default);
        if (1..=MAX_SIZE).contains(&value) {
            return Ok(value);
        }
        let why = format!("{value} is out of range, expected 1 to {MAX_SIZE}");
        Err(ApiError::field(name, why))
    };
    Ok(Size {
        cols: checked("cols", cols, DEFAULT_COLS)?,
        rows: checked("rows", rows, DEFAULT_ROWS)?,
        ..Default::default()
    })
}

async fn run(app: AppState, id: SandboxId, socket: WebSocket) {
    let (outbox, mut inbox) = split(socket);
    let Ok(first) = inbox.first::<ClientMessage>().await else {
        return;
    };
    let opened = match first {
        Ok(ClientMessage::Start(begin)) => start(&app, &id, begin).await,
        Ok(ClientMessage::Connect { tag }) => connect(&app, &id, tag).await,
        Ok(_) => Err(ApiError::new(
            Code::InvalidRequest,
            "the first message must be `start` or `connect`",
        )),
        Err(why) => Err(ApiError::new(
            Code::InvalidRequest,
            format!("the first message must be `start` or `connect`: {why}"),
        )),
    };
    session::serve(&app, outbox, inbox, opened).await;
}

async fn start(
    app: &AppState,
    id: &SandboxId,
    start: Start,
) -> Result<Session<PtyProtocol>, ApiError> {
    let cmd = start.cmd.unwrap_or_else(|| DEFAULT_SHELL.to_owned());
    validate::check_command(&cmd, &start.args)?;
    validate::check_envs(&start.envs)?;
    validate::check_place(start.cwd.as_deref(), start.user.as_deref())?;
    let size = size(start.cols, start.rows)?;
    let tag = process::new_tag("pty");
    let request = StartRequest {
        process: process::config(cmd, start.args, start.envs, start.cwd).into(),
        pty: PTY {
            size: size.into(),
            ..Default::default()
        }
        .into(),
        tag: Some(tag.clone()),
        ..Default::default()
    };
    let user = start.user.unwrap_or_default();
    Session::start(app, id, request, &user, 0, PtyProtocol { tag }).await
}

async fn connect(
    app: &AppState,
    id: &SandboxId,
    tag: String,
) -> Result<Session<PtyProtocol>, ApiError> {
    validate::check_tag("tag", &tag)?;
    let process = Selector::Tag(tag.clone());
    Session::connect(app, id, process, PtyProtocol { tag }).await
}
