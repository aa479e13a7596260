//! Guest agent of the fake guest: the real one, in this process. A middleware in front of it logs
//! the calls for the tests, and rejects calls where a test requests it.

use std::{
    fs, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::{
    body::{Body, to_bytes},
    extract::{Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
};
use tokio::net::TcpListener;
use wrenn_envd::server::{self, Config};

/// Maximum size of the body of a logged call.
const MAX_BODY_BYTES: usize = 1024 * 1024;

/// Port of the echo server.
const ECHO_PORT: u16 = 7000;

/// Port of the echo server on the loopback address, which the guest agent forwards.
const LOOPBACK_PORT: u16 = 7100;

/// Log and faults of a guest.
struct Calls {
    rejects_init: bool,
    dir: PathBuf,
}

impl Calls {
    /// Logs an accepted call, so that a test can see the calls that reached the guest.
    fn log(&self, call: &str) {
        let file = fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("calls.log"));
        // Best effort: a test with a full disk does not read the log.
        let line = format!("{call}\n");
        let _ = file.and_then(|mut file| io::Write::write_all(&mut file, line.as_bytes()));
    }

    /// Waits as long as a test wants a call not to be answered.
    async fn hang(&self, path: &str) {
        let hangs = || match &*crate::snapshot::fault(&self.dir) {
            "silent" => true,
            "hang-prepare" => path == "/snapshot/prepare",
            _ => false,
        };
        while hangs() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Returns the response to a call that a test wants to fail.
    fn rejection(&self, path: &str) -> Option<Response> {
        let fault = || crate::snapshot::fault(&self.dir);
        let (status, message) = match path {
            "/init" if self.rejects_init => (StatusCode::BAD_REQUEST, "settings rejected"),
            "/snapshot/prepare" if fault() == "reject-prepare" => {
                (StatusCode::SERVICE_UNAVAILABLE, "the disk does not answer")
            }
            "/snapshot/prepare" if fault() == "claim-full-disk" => {
                (StatusCode::INSUFFICIENT_STORAGE, "no space left on device")
            }
            "/snapshot/recover" if fault() == "reject-recover" => {
                (StatusCode::SERVICE_UNAVAILABLE, "the clock does not answer")
            }
            _ => return None,
        };
        let body = serde_json::json!({"code": status.as_u16(), "message": message});
        Some((status, axum::Json(body)).into_response())
    }
}

/// Serves in the calling thread, which is the guest.
pub(crate) fn serve(dir: &Path, fake: &str) -> io::Result<()> {
    let config = Config {
        // Processes stay in the cgroup of the tests.
        cgroup_root: "/nonexistent".into(),
        ..Config::default()
    };
    let calls = Arc::new(Calls {
        rejects_init: fake == "reject-init",
        dir: dir.to_owned(),
    });
    // Threads of this runtime start after the calling thread became the guest, so they are in the
    // guest as well.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let echo_address = (Ipv4Addr::UNSPECIFIED, ECHO_PORT);
        tokio::spawn(echo(TcpListener::bind(echo_address).await?));
        let loopback_address = (Ipv4Addr::LOCALHOST, LOOPBACK_PORT);
        tokio::spawn(echo(TcpListener::bind(loopback_address).await?));
        let listener = TcpListener::bind(config.address).await?;
        let (app, launcher) = server::initial_state(&config);
        app.ports.start().await;
        app.mmds.ask();
        let connections = app.connections.clone();
        let router = server::router(app, launcher)
            .layer(middleware::from_fn_with_state(calls, log_or_reject));
        server::serve_router(listener, connections, router).await
    })
}

/// Server of the guest's user: sends received data back until the end of the input.
async fn echo(listener: TcpListener) {
    while let Ok((mut connection, _)) = listener.accept().await {
        tokio::spawn(async move {
            let (mut from, mut to) = connection.split();
            let _ = tokio::io::copy(&mut from, &mut to).await;
        });
    }
}

/// Middleware: rejects a call that a test wants to fail, and logs an accepted call of the host or
/// the start of a process.
async fn log_or_reject(State(calls): State<Arc<Calls>>, request: Request, next: Next) -> Response {
    calls.hang(request.uri().path()).await;
    if let Some(rejection) = calls.rejection(request.uri().path()) {
        return rejection;
    }
    let (request, line) = match request.uri().path() {
        "/init" => with_body(request, "init").await,
        "/snapshot/prepare" => with_body(request, "prepare").await,
        "/snapshot/recover" => with_body(request, "recover").await,
        "/process.Process/Start" => {
            let user = request.headers().get(header::AUTHORIZATION);
            let user = user.and_then(|value| value.to_str().ok()).unwrap_or("-");
            let line = format!("start {user}");
            (request, line)
        }
        _ => return next.run(request).await,
    };
    let response = next.run(request).await;
    if response.status().is_success() {
        calls.log(&line);
    }
    response
}

/// Returns a request with its body in memory, and the line of the log: `name` and the body.
async fn with_body(request: Request, name: &str) -> (Request, String) {
    let (parts, body) = request.into_parts();
    // A body that is cut off or too long fails to parse.
    let body = to_bytes(body, MAX_BODY_BYTES).await.unwrap_or_default();
    let line = format!("{name} {}", String::from_utf8_lossy(&body));
    (Request::from_parts(parts, Body::from(body)), line)
}
