//! Activity between the check that finds a sandbox idle and the step that would end it.
//!
//! In each test, the reconciler polls only once, at its start. Both the poll and the step list the
//! host's sandboxes. A gate at the list call therefore holds the step until the test has done its
//! work in between.

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Value, json};
use sqlx::Connection as _;
use wrenn_proto::rpc::hostagent::v1::SandboxState;

use crate::support::{Control, ErrorCode, FakeAgent, Options, Socket, fake_agent::now_ms, until};

/// Idle time of the sandbox. Longer than its timeout.
const IDLE_MS: i64 = 3_600_000;

/// Actions on an idle sandbox, and the resulting statuses.
const ENDS: [(&str, &str); 2] = [("pause", "paused"), ("kill", "stopped")];

struct Held {
    agent: FakeAgent,
    control: Control,
    id: String,
}

impl Held {
    /// Creates a sandbox that was found idle and whose step waits at the gate.
    async fn new(on_timeout: &str) -> Self {
        let agent = FakeAgent::start().await;
        let once = || Options {
            poll_interval: Duration::from_secs(3600),
            ..Options::default()
        };
        let before = Control::start_with(&agent, once()).await;
        let asked = json!({ "timeout_sec": 1800, "on_timeout": on_timeout });
        let (status, made) = before.post("/v1/sandboxes", asked).await;
        assert_eq!(status, StatusCode::CREATED, "{made}");
        let id = made["id"].as_str().unwrap().to_owned();
        let dir = before.stop().await;
        agent.change(&id, |sandbox| sandbox.last_active_ms -= IDLE_MS);
        let rows = format!("sqlite://{}/wrenn.db", dir.path().display());
        let mut rows = sqlx::SqliteConnection::connect(&rows).await.unwrap();
        let older = "UPDATE sandboxes SET started_at = started_at - $1, last_active_at = last_active_at - $1";
        let older = sqlx::query(older).bind(IDLE_MS).execute(&mut rows).await;
        assert_eq!(older.unwrap().rows_affected(), 1);
        rows.close().await.unwrap();
        agent.state.list_gate.shut();
        let control = Control::start_with(&agent, Options { dir, ..once() }).await;
        let held = Self { agent, control, id };
        held.until_waiting().await;
        let looked = held.agent.calls("ListSandboxes");
        held.agent.state.list_gate.admit_one();
        until("the step calls the host", async || {
            (held.agent.calls("ListSandboxes") > looked).then_some(())
        })
        .await;
        held.until_waiting().await;
        held
    }

    async fn until_waiting(&self) {
        until("a list call waits at the gate", async || {
            (self.agent.state.list_gate.waiting() == 1).then_some(())
        })
        .await;
    }

    async fn ping(&self) {
        let path = format!("/v1/sandboxes/{}/ping", self.id);
        let (status, body) = self.control.post(&path, Value::Null).await;
        assert_eq!(status, StatusCode::NO_CONTENT, "{body}");
    }

    /// Releases the step and waits for its end. The refresh waits for the lock that the step holds,
    /// and changes nothing.
    async fn go_on(&self) -> StatusCode {
        self.agent.state.list_gate.open();
        let path = format!("/sandboxes/{}/refreshes", self.id);
        self.control.post(&path, json!({ "duration": 0 })).await.0
    }

    async fn assert_kept(&self) {
        assert_eq!(self.go_on().await, StatusCode::NO_CONTENT);
        let path = format!("/v1/sandboxes/{}", self.id);
        let (_, row) = self.control.get(&path).await;
        assert_eq!(row["status"], "running", "{row}");
        assert_eq!(row.get("warning"), None, "{row}");
        let sandbox = self.agent.sandbox(&self.id).unwrap();
        assert_eq!(sandbox.state, SandboxState::SANDBOX_STATE_RUNNING);
        assert_eq!(self.agent.calls("PauseSandbox"), 0);
        assert_eq!(self.agent.calls("DestroySandbox"), 0);
    }
}

#[tokio::test]
async fn unused_sandbox_is_ended() {
    for (on_timeout, wanted) in ENDS {
        let held = Held::new(on_timeout).await;
        assert_eq!(held.control.status(&held.id).await, "running");
        // The sandbox is paused or gone, so it has no deadline to move.
        assert_eq!(held.go_on().await, StatusCode::NOT_FOUND);
        let row = held.control.until_status(&held.id, wanted).await;
        let why = row["error"].as_str().unwrap_or_default();
        assert_eq!(why.contains("idle for"), on_timeout == "kill", "{row}");
    }
}

#[tokio::test]
async fn ping_between_the_check_and_the_end_keeps_the_sandbox() {
    for (on_timeout, _) in ENDS {
        let held = Held::new(on_timeout).await;
        held.ping().await;
        held.assert_kept().await;
    }
}

#[tokio::test]
async fn activity_unknown_to_the_host_keeps_the_sandbox() {
    for (on_timeout, _) in ENDS {
        let held = Held::new(on_timeout).await;
        held.ping().await;
        held.agent
            .change(&held.id, |sandbox| sandbox.last_active_ms -= IDLE_MS);
        held.assert_kept().await;
    }
}

#[tokio::test]
async fn activity_known_only_to_the_host_keeps_the_sandbox() {
    for (on_timeout, _) in ENDS {
        let held = Held::new(on_timeout).await;
        held.agent
            .change(&held.id, |sandbox| sandbox.last_active_ms = now_ms());
        held.assert_kept().await;
    }
}

#[tokio::test]
async fn activity_in_progress_keeps_the_sandbox() {
    for (on_timeout, _) in ENDS {
        let held = Held::new(on_timeout).await;
        let pty = format!("/v1/sandboxes/{}/pty", held.id);
        let mut socket = Socket::open(&held.control, &pty).await;
        socket.send(json!({ "type": "start" })).await;
        socket.expect("started").await;
        held.agent
            .change(&held.id, |sandbox| sandbox.last_active_ms -= IDLE_MS);
        held.assert_kept().await;
    }
}

#[tokio::test]
async fn failed_pause_leaves_a_warning() {
    let held = Held::new("pause").await;
    held.agent.fail(
        "PauseSandbox",
        ErrorCode::ResourceExhausted,
        "the disk is full",
    );
    assert_eq!(held.go_on().await, StatusCode::NO_CONTENT);
    let path = format!("/v1/sandboxes/{}", held.id);
    let (_, row) = held.control.get(&path).await;
    assert_eq!(row["status"], "running", "{row}");
    let warning = row["warning"].as_str().unwrap();
    assert!(
        warning.contains("idle for") && warning.contains("the disk is full"),
        "{warning}"
    );
}
