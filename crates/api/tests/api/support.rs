//! Per-test control plane, and the fake agent that it talks to.

#[macro_use]
mod databases;
pub(crate) mod fake_agent;
mod socket;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use wrenn_control::{ControlConfig, ControlError, Limits};
use wrenn_model::Egress;

pub(crate) use databases::Databases;
pub(crate) use fake_agent::{ErrorCode, FakeAgent, TUNNEL};
pub(crate) use socket::Socket;

/// Maximum time of any step in these tests.
pub(crate) const GENEROUS: Duration = Duration::from_secs(30);

/// Running control plane.
pub(crate) struct Control {
    address: SocketAddr,
    traffic: SocketAddr,
    dir: Arc<tempfile::TempDir>,
    key: String,
    shutdown: CancellationToken,
    task: Option<JoinHandle<Result<(), ControlError>>>,
    client: reqwest::Client,
}

/// Options of a control plane.
pub(crate) struct Options {
    pub(crate) dir: Arc<tempfile::TempDir>,
    pub(crate) database_url: Option<String>,
    pub(crate) poll_interval: Duration,
    pub(crate) limits: Limits,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            dir: Arc::new(tempfile::tempdir().unwrap()),
            database_url: None,
            poll_interval: Duration::from_millis(50),
            limits: Limits::default(),
        }
    }
}

/// List of all sandboxes except destroyed ones.
pub(crate) const NOT_STOPPED: &str =
    "/v1/sandboxes?status=pending,starting,running,pausing,paused,resuming,stopping,error";

impl Control {
    pub(crate) async fn start(agent: &FakeAgent) -> Self {
        Self::start_with(agent, Options::default()).await
    }

    pub(crate) async fn start_with(agent: &FakeAgent, options: Options) -> Self {
        let key_file = options.dir.path().join("api-key");
        let config = ControlConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            traffic_listen: "127.0.0.1:0".parse().unwrap(),
            database_url: options.database_url.unwrap_or_else(|| {
                format!(
                    "sqlite://{}/wrenn.db?mode=rwc",
                    options.dir.path().display()
                )
            }),
            agent_url: agent.url(),
            agent_token: fake_agent::TOKEN.to_owned(),
            default_egress: Egress::Deny,
            first_key_file: Some(key_file.clone()),
            first_e2b_key_file: Some(options.dir.path().join("e2b-api-key")),
            poll_interval: options.poll_interval,
            limits: options.limits,
        };
        let shutdown = CancellationToken::new();
        let (tell, told) = tokio::sync::oneshot::channel();
        let stop = shutdown.clone();
        let task = tokio::spawn(async move {
            wrenn_api::serve(config, |listening| _ = tell.send(listening), stop).await
        });
        let listening = tokio::time::timeout(GENEROUS, told).await.unwrap().unwrap();
        let key = std::fs::read_to_string(key_file).unwrap().trim().to_owned();
        Self {
            address: listening.api,
            traffic: listening.traffic,
            dir: options.dir,
            key,
            shutdown,
            task: Some(task),
            client: reqwest::Client::new(),
        }
    }

    /// Stops the control plane as a signal would. Returns the directory, for the next control
    /// plane.
    pub(crate) async fn stop(mut self) -> Arc<tempfile::TempDir> {
        self.shutdown.cancel();
        let task = self.task.take().unwrap();
        tokio::time::timeout(GENEROUS, task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        Arc::clone(&self.dir)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Address of the listener for requests to ports of sandboxes.
    pub(crate) fn traffic(&self) -> SocketAddr {
        self.traffic
    }

    /// First key in the form of the E2B API.
    pub(crate) fn e2b_key(&self) -> String {
        let file = self.dir.path().join("e2b-api-key");
        std::fs::read_to_string(file).unwrap().trim().to_owned()
    }

    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.dir.path().join("wrenn.db")
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client
            .request(method, self.url(path))
            .header("X-API-Key", &self.key)
    }

    /// Sends JSON (no body for `null`). Returns `null` for an empty response body.
    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        body: &Value,
    ) -> (StatusCode, Value) {
        let mut request = self.request(method, path);
        if !body.is_null() {
            request = request.json(body);
        }
        answer(request).await
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.call(Method::GET, path, &Value::Null).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.call(Method::POST, path, &body).await
    }

    pub(crate) async fn delete(&self, path: &str) -> (StatusCode, Value) {
        self.call(Method::DELETE, path, &Value::Null).await
    }

    /// Creates a running sandbox and returns its id.
    pub(crate) async fn create(&self) -> String {
        let (status, body) = self.post("/v1/sandboxes", serde_json::json!({})).await;
        assert_eq!(status, StatusCode::CREATED, "{body}");
        assert_eq!(body["status"], "running", "{body}");
        body["id"].as_str().unwrap().to_owned()
    }

    /// Creates a sandbox by the E2B API, with additional fields, and returns the response.
    pub(crate) async fn e2b_create(&self, more: Value) -> Value {
        let mut body = serde_json::json!({ "templateID": "minimal" });
        let more = more.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(more);
        let (status, body) = self.post("/v2/sandboxes", body).await;
        assert_eq!(status, StatusCode::CREATED, "{body}");
        body
    }

    /// Creates a sandbox by the E2B API and returns its id.
    pub(crate) async fn e2b_id(&self, more: Value) -> String {
        let made = self.e2b_create(more).await;
        made["sandboxID"].as_str().unwrap().to_owned()
    }

    /// Returns the status of a sandbox's record.
    pub(crate) async fn status(&self, id: &str) -> String {
        let (status, body) = self.get(&format!("/v1/sandboxes/{id}")).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body["status"].as_str().unwrap().to_owned()
    }

    /// Waits for a status and returns the record.
    pub(crate) async fn until_status(&self, id: &str, wanted: &str) -> Value {
        until(&format!("{id} is {wanted}"), async || {
            let (_, body) = self.get(&format!("/v1/sandboxes/{id}")).await;
            (body["status"] == wanted).then_some(body)
        })
        .await
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Asserts that a response is an error with this status and code, and that its message contains all
/// texts.
#[track_caller]
pub(crate) fn assert_failure(got: &(StatusCode, Value), status: u16, code: &str, words: &[&str]) {
    let (got_status, body) = got;
    assert_eq!(got_status.as_u16(), status, "{body}");
    assert_eq!(body["error"]["code"], code, "{body}");
    let message = body["error"]["message"].as_str().unwrap();
    for word in words {
        assert!(message.contains(word), "{message:?} lacks {word:?}");
    }
    assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
}

/// Same as [`assert_failure`], for the format of the E2B API.
#[track_caller]
pub(crate) fn assert_e2b_failure(got: &(StatusCode, Value), status: u16, words: &[&str]) {
    let (got_status, body) = got;
    assert_eq!(got_status.as_u16(), status, "{body}");
    assert_eq!(body["code"], status, "{body}");
    let message = body["message"].as_str().unwrap();
    for word in words {
        assert!(message.contains(word), "{message:?} lacks {word:?}");
    }
}

/// Sends a request. Returns `null` for a response body that is not JSON.
pub(crate) async fn answer(request: RequestBuilder) -> (StatusCode, Value) {
    let response = request.send().await.unwrap();
    let status = response.status();
    let body = response.bytes().await.unwrap();
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

/// Sends a create request and disconnects while the host works on it. The gate for creates must be
/// closed.
pub(crate) async fn create_and_leave(agent: &FakeAgent, request: RequestBuilder) {
    let waiting = tokio::spawn(request.send());
    until("the host works on the create", async || {
        (agent.state.create_gate.waiting() == 1).then_some(())
    })
    .await;
    waiting.abort();
    let _ = waiting.await;
}

/// Polls until there is a result. Fails the test at the deadline.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + GENEROUS;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(
            tokio::time::Instant::now() < deadline,
            "timed out waiting until {what}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
