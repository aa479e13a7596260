//! Fake control plane that answers like the real one and records the requests.

use std::{
    net::SocketAddr,
    process::{Output, Stdio},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    extract::{
        Request, State, WebSocketUpgrade,
        ws::{Message, WebSocket, rejection::WebSocketUpgradeRejection},
    },
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{process::Command, sync::Notify};

/// Deadline of every step of a test.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Behavior of the fake on a WebSocket.
#[derive(Debug, Clone)]
pub(crate) enum Script {
    /// Sends these messages and waits for the client to disconnect.
    Send(Vec<Value>),
    /// Answers input with the same bytes; exits with 0 at the end of input (`exec/stream`) or at a
    /// `\x04` (`pty`).
    Echo,
    /// Sends nothing.
    Hang,
}

#[derive(Debug)]
struct Inner {
    script: Script,
    hold_create: bool,
    create_released: Notify,
    calls: Mutex<Vec<String>>,
    messages: Mutex<Vec<Value>>,
    changed: Notify,
}

/// Fake server; it lives as long as the test's runtime.
#[derive(Debug, Clone)]
pub(crate) struct Fake {
    address: SocketAddr,
    inner: Arc<Inner>,
}

impl Fake {
    pub(crate) async fn start(script: Script) -> Self {
        Self::with(script, false).await
    }

    /// Starts a server whose create calls are answered after [`Fake::release_create`].
    pub(crate) async fn start_slow(script: Script) -> Self {
        Self::with(script, true).await
    }

    async fn with(script: Script, hold_create: bool) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let inner = Arc::new(Inner {
            script,
            hold_create,
            create_released: Notify::new(),
            calls: Mutex::default(),
            messages: Mutex::default(),
            changed: Notify::new(),
        });
        let fake = Self { address, inner };
        let router = Router::new().fallback(answer).with_state(fake.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        fake
    }

    /// Returns a `wrenn` command whose settings point to this server only.
    pub(crate) fn wrenn(&self, args: &[&str]) -> Command {
        let mut command = wrenn(args);
        command
            .env("WRENN_API_URL", format!("http://{}", self.address))
            .env("WRENN_API_KEY", "wrn_test");
        command
    }

    pub(crate) fn release_create(&self) {
        self.inner.create_released.notify_one();
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.inner.calls.lock().clone()
    }

    pub(crate) fn messages(&self) -> Vec<Value> {
        self.inner.messages.lock().clone()
    }

    /// Waits until this call was received.
    pub(crate) async fn called(&self, call: &str) {
        self.until(|fake| fake.calls().iter().any(|c| c == call), call)
            .await;
    }

    /// Waits until a message of this type was received.
    pub(crate) async fn received(&self, kind: &str) -> Value {
        self.until(|fake| fake.find(kind).is_some(), kind).await;
        self.find(kind).unwrap()
    }

    fn find(&self, kind: &str) -> Option<Value> {
        self.messages().into_iter().find(|m| m["type"] == kind)
    }

    async fn until(&self, condition: impl Fn(&Self) -> bool, what: &str) {
        let wait = async {
            loop {
                let changed = self.inner.changed.notified();
                if condition(self) {
                    return;
                }
                changed.await;
            }
        };
        if tokio::time::timeout(DEADLINE, wait).await.is_err() {
            panic!("no {what}; {:?} {:?}", self.calls(), self.messages());
        }
    }

    fn note_call(&self, call: String) {
        self.inner.calls.lock().push(call);
        self.inner.changed.notify_waiters();
    }

    fn note_message(&self, message: Value) {
        self.inner.messages.lock().push(message);
        self.inner.changed.notify_waiters();
    }
}

/// Returns a `wrenn` command without any settings of this machine.
pub(crate) fn wrenn(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn"));
    command
        .args(args)
        .env_clear()
        .env("WRENN_CONFIG", "/dev/null")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Runs a command to completion, within the deadline.
pub(crate) async fn finish(command: &mut Command) -> Output {
    tokio::time::timeout(DEADLINE, command.output())
        .await
        .expect("an end in time")
        .unwrap()
}

pub(crate) fn sandbox(id: &str, status: &str) -> Value {
    json!({
        "id": id, "status": status, "template": "minimal", "vcpus": 1, "memory_mb": 512,
        "disk_size_mb": 5120, "timeout_sec": 300, "egress": "deny", "metadata": {},
        "created_at": "2026-01-10T00:00:00Z", "last_updated": "2026-01-10T00:00:00Z",
    })
}

fn reject(status: StatusCode, code: &str, message: &str) -> Response {
    let body = json!({"error": {"code": code, "message": message}});
    (status, axum::Json(body)).into_response()
}

/// Returns the answer to a command whose stream the script would reject with its first message.
fn not_executed(script: &Script) -> Response {
    let exit_code = match script {
        Script::Send(messages) => messages[0]["exit_code"].clone(),
        Script::Echo | Script::Hang => Value::Null,
    };
    let body = json!({"error": {
        "code": "invalid_request", "message": "error starting process: prog: cause",
        "details": {"exit_code": exit_code},
    }});
    (StatusCode::BAD_REQUEST, axum::Json(body)).into_response()
}

/// Returns the sandboxes with a requested status.
fn list(query: &str) -> Value {
    let words = query.strip_prefix("status=").unwrap_or_default();
    let asked: Vec<&str> = words.split("%2C").collect();
    [("sb-1", "running"), ("sb-2", "stopped"), ("sb-3", "error")]
        .into_iter()
        .filter(|(_, status)| asked.contains(status))
        .map(|(id, status)| sandbox(id, status))
        .collect()
}

async fn answer(
    State(fake): State<Fake>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    request: Request,
) -> Response {
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let method = request.method().clone();
    fake.note_call(format!("{method} {path}"));
    if let Ok(upgrade) = upgrade {
        return upgrade.on_upgrade(move |socket| play(fake, socket));
    }
    let ok = |body: Value| axum::Json(body).into_response();
    match (method, path.as_str()) {
        (Method::POST, "/v1/sandboxes") => {
            if fake.inner.hold_create {
                fake.inner.create_released.notified().await;
            }
            (StatusCode::CREATED, ok(sandbox("sb-1", "pending"))).into_response()
        }
        (Method::GET, "/v1/sandboxes") => ok(list(&query)),
        (Method::GET, "/v1/sandboxes/sb-1") => ok(sandbox("sb-1", "running")),
        (Method::DELETE, "/v1/sandboxes/sb-1") => StatusCode::NO_CONTENT.into_response(),
        (Method::POST, "/v1/sandboxes/sb-1/files/stream/read") => "CONTENT".into_response(),
        (Method::POST, "/v1/sandboxes/sb-1/exec") => not_executed(&fake.inner.script),
        _ => reject(
            StatusCode::NOT_FOUND,
            "not_found",
            "there is no such sandbox",
        ),
    }
}

async fn play(fake: Fake, mut socket: WebSocket) {
    if let Script::Send(messages) = &fake.inner.script {
        for message in messages {
            let _ = socket.send(Message::text(message.to_string())).await;
        }
    }
    while let Some(Ok(message)) = socket.recv().await {
        let Message::Text(text) = message else {
            continue;
        };
        let message: Value = serde_json::from_str(&text).unwrap();
        let reply = reply(&fake.inner.script, &message);
        fake.note_message(message);
        if let Some(reply) = reply {
            let _ = socket.send(Message::text(reply.to_string())).await;
        }
    }
    fake.note_call("the client left".to_owned());
}

fn reply(script: &Script, message: &Value) -> Option<Value> {
    if message["type"] == "stop" {
        return Some(json!({"type": "exit", "exit_code": -1, "error": "signal: terminated"}));
    }
    if !matches!(script, Script::Echo) {
        return None;
    }
    let exit = json!({"type": "exit", "exit_code": 0});
    match message["type"].as_str()? {
        // "\x04" in base64.
        "input" if message["data"] == "BA==" => Some(exit),
        "input" => Some(json!({"type": "output", "data": message["data"]})),
        "stdin" => Some(json!({"type": "stdout", "data": message["data"], "encoding": "base64"})),
        "close_stdin" => Some(exit),
        _ => None,
    }
}
