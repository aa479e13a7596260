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
//! | binary frame | keyboard input, verbatim |
//! | `{"type":"input","data":BASE64}` | keyboard input |
//! | `{"type":"resize","cols":N,"rows":N}` | new size of the terminal |
//! | `{"type":"kill"}` | SIGKILL, even while input is queued |
//! | `{"type":"pong"}` | no effect |
//!
//! | message of the server | meaning |
//! |---|---|
//! | `{"type":"started","tag":TEXT,"pid":N}` | the terminal runs |
//! | binary frame, or `{"type":"output","data":BASE64}` | output, in the form that the client has chosen (`output_format`) |
//! | `{"type":"exit","exit_code":N}` | `"error"` unless it exited by itself; the server closes |
//! | `{"type":"error","data":TEXT,"fatal":BOOL,"code":CODE}` | failure, as in `exec_stream` |
//! | `{"type":"ping"}` | every 30 s |
//!
//! The terminal has no idle limit and outlives its client.

mod output_format;

use std::collections::BTreeMap;

use axum::{
    extract::{State, ws::WebSocket},
    response::Response,
};
use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;
use wrenn_model::SandboxId;
use wrenn_proto::rpc::process::{
    PTY, StartRequest,
    process_event::{Event, data_event::Output},
    pty::Size,
};

use self::output_format::{FormatChoice, OutputFormat};
use super::{
    controls::{Controls, InputKind, Kill},
    process::{self, Selector},
    session::{self, Failure, Protocol, Session},
    socket::{ApiSocket, Incoming, Outgoing, split},
};
use crate::{
    app::AppState,
    error::{ApiError, Code},
    extract::{ApiQuery, SandboxPath},
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

/// Query of the request for a terminal.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct PtyQuery {
    /// Form of the output: `binary` (binary frames) or `base64` (JSON messages `output`). Default:
    /// the form of the client's input; binary frames for a client that sends no input at first.
    #[param(inline)]
    output: Option<OutputFormat>,
}

/// Opens a terminal, or reconnects to one, over a WebSocket.
///
/// The first message of the client is the JSON object `{"type":"start","cols":80,"rows":24}`, with
/// optional `cmd` (default `/bin/bash`), `args`, `envs`, `cwd` and `user`, or
/// `{"type":"connect","tag":…}`. Later, every binary frame is input. JSON messages are `input` with
/// `data` in base64, `resize` with `cols` and `rows`, `kill`, and `pong`.
///
/// The server sends output as binary frames, or as `output` with `data` in base64: as the parameter
/// `output` says, otherwise in the form of the client's input. Its other messages are `started`
/// with `tag` and `pid`, `exit` with `exit_code`, `error` as in `exec/stream`, and `ping` every 30
/// s. A terminal outlives its client, which can reconnect with the `tag`. It ends when its own
/// process ends; `kill` ends all its jobs.
#[utoipa::path(
    get, path = "/{id}/pty", tag = "processes", operation_id = "pty",
    params(("id" = String, Path, description = "Sandbox id."), PtyQuery),
    responses((status = 101, description = "The WebSocket is open."), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn pty(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ApiQuery(query): ApiQuery<PtyQuery>,
    socket: ApiSocket,
) -> Result<Response, ApiError> {
    let formats = FormatChoice::new(query.output);
    socket
        .open(app, id, |app, id, socket| run(app, id, formats, socket))
        .await
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ClientMessage {
    Start(Start),
    Connect {
        tag: String,
    },
    Input {
        data: String,
    },
    Resize {
        cols: u32,
        rows: u32,
    },
    Kill,
    Pong,
    /// Binary frame.
    #[serde(skip)]
    Raw(Bytes),
}

impl Incoming for ClientMessage {
    fn from_binary(bytes: Bytes) -> Option<Self> {
        Some(Self::Raw(bytes))
    }
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
    /// Binary frame.
    #[serde(skip)]
    Raw(Bytes),
    Exit {
        exit_code: i32,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    Error(Failure),
    Ping,
}

impl Outgoing for ServerMessage {
    fn as_binary(&self) -> Option<Bytes> {
        match self {
            Self::Raw(bytes) => Some(bytes.clone()),
            _ => None,
        }
    }
}

/// Protocol of `pty`.
struct PtyProtocol {
    tag: String,
    formats: FormatChoice,
}

impl Protocol for PtyProtocol {
    const INPUT: InputKind = InputKind::Pty;
    const KILL: Kill = Kill::AtOnce;
    type ClientMessage = ClientMessage;
    type ServerMessage = ServerMessage;
    type Listener = FormatChoice;

    fn listener(&self) -> FormatChoice {
        self.formats.clone()
    }

    async fn on_message(
        formats: &FormatChoice,
        message: ClientMessage,
        controls: &Controls,
    ) -> Result<(), String> {
        match message {
            ClientMessage::Start(_) | ClientMessage::Connect { .. } => {
                Err("unexpected `start` or `connect`: the session has already started".to_owned())
            }
            ClientMessage::Input { data } => {
                let bytes = BASE64
                    .decode(data)
                    .map_err(|e| format!("`data` is not valid base64: {e}"))?;
                formats.note_input(OutputFormat::Base64);
                controls.input(bytes).await;
                Ok(())
            }
            ClientMessage::Raw(bytes) => {
                formats.note_input(OutputFormat::Binary);
                controls.input(bytes.into()).await;
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
            ClientMessage::Pong => Ok(()),
        }
    }

    async fn ready(&mut self) {
        self.formats.decided().await;
    }

    fn encode(&mut self, event: Event) -> Vec<ServerMessage> {
        match event {
            Event::Start(start) => {
                self.formats.begin();
                vec![ServerMessage::Started {
                    tag: self.tag.clone(),
                    pid: start.pid,
                }]
            }
            Event::Data(data) => match data.output {
                Some(Output::Pty(bytes) | Output::Stdout(bytes) | Output::Stderr(bytes)) => {
                    vec![match self.formats.get() {
                        OutputFormat::Binary => ServerMessage::Raw(bytes.into()),
                        OutputFormat::Base64 => ServerMessage::Output {
                            data: BASE64.encode(bytes),
                        },
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

async fn run(app: AppState, id: SandboxId, formats: FormatChoice, socket: WebSocket) {
    let (outbox, mut inbox) = split(socket);
    let Ok(first) = inbox.first::<ClientMessage>().await else {
        return;
    };
    let opened = match first {
        Ok(ClientMessage::Start(begin)) => start(&app, &id, begin, formats).await,
        Ok(ClientMessage::Connect { tag }) => connect(&app, &id, tag, formats).await,
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
    formats: FormatChoice,
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
    let protocol = PtyProtocol { tag, formats };
    Session::start(app, id, request, &user, 0, protocol).await
}

async fn connect(
    app: &AppState,
    id: &SandboxId,
    tag: String,
    formats: FormatChoice,
) -> Result<Session<PtyProtocol>, ApiError> {
    validate::check_tag("tag", &tag)?;
    let process = Selector::Tag(tag.clone());
    Session::connect(app, id, process, PtyProtocol { tag, formats }).await
}
