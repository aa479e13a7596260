//! Fake guest agent: the calls that only the host makes, with faults, and the start of processes,
//! which are real and run in the guest's network. The real guest agent cannot be used here: this
//! program is a binary of the agent's crate and has none of the development dependencies, and the
//! agent must not depend on a program of the guest.

use std::{
    fs, io,
    path::Path,
    process::Stdio,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response as RpcResponse, Router, ServiceRequest,
    ServiceResult, ServiceStream,
};
use http::StatusCode;
use tokio::{io::AsyncReadExt as _, sync::mpsc};
use wrenn_proto::rpc::process::{
    self as rpc,
    process_event::{Event, data_event::Output},
};

/// State of the guest: the token set by `/init`, and the log of received calls for the tests.
struct Guest {
    token: OnceLock<String>,
    refuse_init: bool,
    dir: std::path::PathBuf,
    calls: std::path::PathBuf,
}

impl Guest {
    /// Records a call, so that a test can see the calls that reached the guest.
    fn note(&self, call: &str) {
        let file = fs::File::options()
            .create(true)
            .append(true)
            .open(&self.calls);
        // Best effort: a test with a full disk does not read the log.
        let line = format!("{call}\n");
        let _ = file.and_then(|mut file| io::Write::write_all(&mut file, line.as_bytes()));
    }
}

pub(crate) fn serve(dir: &Path, fake: &str) -> io::Result<()> {
    let guest = Arc::new(Guest {
        token: OnceLock::new(),
        refuse_init: fake == "refuse-init",
        dir: dir.to_owned(),
        calls: dir.join("calls.log"),
    });
    let rpc = Router::new().add_service(Arc::new(Processes(guest.clone())));
    let app = axum::Router::new()
        .route("/metrics", get(metrics))
        .fallback_service(rpc.into_axum_service())
        .layer(axum::middleware::from_fn_with_state(
            guest.clone(),
            check_token,
        ))
        .route("/health", get(StatusCode::NO_CONTENT))
        .route("/init", post(init))
        .route("/snapshot/prepare", post(prepare))
        .route("/snapshot/recover", post(recover))
        .with_state(guest);
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            tokio::spawn(echo(tokio::net::TcpListener::bind("0.0.0.0:7000").await?));
            let listener = tokio::net::TcpListener::bind("0.0.0.0:49983").await?;
            axum::serve(listener, app).await
        })
}

/// Server of the guest's user: sends received data back until the end of the input.
async fn echo(listener: tokio::net::TcpListener) {
    while let Ok((mut connection, _)) = listener.accept().await {
        tokio::spawn(async move {
            let (mut from, mut to) = connection.split();
            let _ = tokio::io::copy(&mut from, &mut to).await;
        });
    }
}

fn error(status: StatusCode, message: &str) -> Response {
    let body = serde_json::json!({"code": status.as_u16(), "message": message});
    (status, axum::Json(body)).into_response()
}

async fn check_token(State(guest): State<Arc<Guest>>, request: Request, next: Next) -> Response {
    let token = request.headers().get("x-access-token");
    let right = guest
        .token
        .get()
        .is_some_and(|right| token.is_some_and(|t| t == right.as_str()));
    if !right {
        return error(StatusCode::UNAUTHORIZED, "wrong token");
    }
    next.run(request).await
}

async fn init(
    State(guest): State<Arc<Guest>>,
    axum::Json(body): axum::Json<serde_json::Value>,
) -> Response {
    if guest.refuse_init {
        return error(StatusCode::BAD_REQUEST, "settings rejected");
    }
    guest.note(&format!("init {body}"));
    let token = body["accessToken"].as_str().unwrap_or_default().to_owned();
    let _ = guest.token.set(token);
    StatusCode::NO_CONTENT.into_response()
}

async fn prepare(
    State(guest): State<Arc<Guest>>,
    axum::Json(body): axum::Json<serde_json::Value>,
) -> Response {
    if crate::freeze::fault(&guest.dir) == "refuse-prepare" {
        return error(StatusCode::SERVICE_UNAVAILABLE, "the disk does not answer");
    }
    guest.note(&format!("prepare {body}"));
    StatusCode::NO_CONTENT.into_response()
}

/// Sets the token that a restored guest receives with this call.
async fn recover(
    State(guest): State<Arc<Guest>>,
    axum::Json(body): axum::Json<serde_json::Value>,
) -> Response {
    if crate::freeze::fault(&guest.dir) == "refuse-recover" {
        return error(StatusCode::SERVICE_UNAVAILABLE, "the clock does not answer");
    }
    guest.note(&format!("recover {body}"));
    if let Some(token) = body["accessToken"].as_str() {
        let _ = guest.token.set(token.to_owned());
    }
    StatusCode::NO_CONTENT.into_response()
}

async fn metrics() -> Response {
    axum::Json(serde_json::json!({
        "ts": 7, "cpu_count": 2, "cpu_used_pct": 12.5, "mem_total": 100, "mem_used": 50, "mem_cache": 20,
        "mem_total_mib": 0, "disk_used": 30, "disk_total": 40
    }))
    .into_response()
}

struct Processes(Arc<Guest>);

fn event(event: impl Into<Event>) -> rpc::StartResponse {
    rpc::StartResponse {
        event: rpc::ProcessEvent {
            event: Some(event.into()),
            ..Default::default()
        }
        .into(),
        ..Default::default()
    }
}

type Events = mpsc::Sender<Result<rpc::StartResponse, ConnectError>>;

async fn copy(
    mut from: impl tokio::io::AsyncRead + Unpin,
    to: Events,
    output: impl Fn(Vec<u8>) -> Output,
) {
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let data = rpc::process_event::DataEvent {
            output: Some(output(buffer[..length].to_vec())),
            ..Default::default()
        };
        // A reader that disconnects does not end the process.
        let _ = to.send(Ok(event(data))).await;
    }
}

async fn run(mut child: tokio::process::Child, events: Events, limit: Option<Duration>) {
    let start = rpc::process_event::StartEvent {
        pid: child.id().unwrap_or_default(),
        ..Default::default()
    };
    let _ = events.send(Ok(event(start))).await;
    let stdout = child.stdout.take().expect("piped");
    let stderr = child.stderr.take().expect("piped");
    let output = async {
        tokio::join!(
            copy(stdout, events.clone(), Output::Stdout),
            copy(stderr, events.clone(), Output::Stderr)
        );
    };
    let limit = limit.unwrap_or(Duration::from_secs(100_000));
    let expired = tokio::time::timeout(limit, output).await.is_err();
    if expired {
        let _ = child.start_kill();
    }
    let status = child.wait().await.expect("a child");
    let end = rpc::process_event::EndEvent {
        exit_code: status.code().unwrap_or(-1),
        exited: status.code().is_some(),
        status: status.to_string(),
        error: status.code().is_none().then(|| "signal: killed".to_owned()),
        ..Default::default()
    };
    let _ = events.send(Ok(event(end))).await;
    if expired {
        let _ = events
            .send(Err(ConnectError::deadline_exceeded("late")))
            .await;
    }
}

#[allow(refining_impl_trait, reason = "plain messages")]
impl rpc::Process for Processes {
    async fn list(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, rpc::ListRequest>,
    ) -> ServiceResult<rpc::ListResponse> {
        unused()
    }

    async fn connect(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, rpc::ConnectRequest>,
    ) -> ServiceResult<ServiceStream<rpc::ConnectResponse>> {
        unused()
    }

    async fn start(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, rpc::StartRequest>,
    ) -> ServiceResult<ServiceStream<rpc::StartResponse>> {
        let user = ctx.header("authorization").and_then(|v| v.to_str().ok());
        self.0.note(&format!("start {}", user.unwrap_or("-")));
        let config = request.to_owned_message().process;
        let child = tokio::process::Command::new(&config.cmd)
            .args(&config.args)
            .envs(&config.envs)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| ConnectError::invalid_argument(e.to_string()))?;
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(run(child, sender, ctx.time_remaining()));
        let events = futures::stream::unfold(receiver, |mut receiver| async move {
            Some((receiver.recv().await?, receiver))
        });
        RpcResponse::stream_ok(events)
    }

    async fn update(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, rpc::UpdateRequest>,
    ) -> ServiceResult<rpc::UpdateResponse> {
        unused()
    }

    async fn stream_input(
        &self,
        _: RequestContext,
        _: InboundStream<rpc::StreamInputRequest>,
    ) -> ServiceResult<rpc::StreamInputResponse> {
        unused()
    }

    async fn send_input(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, rpc::SendInputRequest>,
    ) -> ServiceResult<rpc::SendInputResponse> {
        unused()
    }

    async fn send_signal(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, rpc::SendSignalRequest>,
    ) -> ServiceResult<rpc::SendSignalResponse> {
        unused()
    }

    async fn close_stdin(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, rpc::CloseStdinRequest>,
    ) -> ServiceResult<rpc::CloseStdinResponse> {
        unused()
    }
}

fn unused<T>() -> ServiceResult<T> {
    Err(ConnectError::unimplemented(
        "the agent's tests do not use it",
    ))
}
