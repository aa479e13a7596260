//! Losses, restarts and idleness, as the reconciler sees them.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use wrenn_proto::rpc::hostagent::v1::SandboxState;

use crate::support::{
    Control, ErrorCode, FakeAgent, Options, Socket, assert_failure, fake_agent::now_ms, until,
};

fn eager() -> Options {
    Options {
        poll_interval: Duration::from_millis(10),
        ..Options::default()
    }
}

#[tokio::test]
async fn lost_vm_is_an_error_with_its_reason() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let (died, lost, lives) = (
        control.create().await,
        control.create().await,
        control.create().await,
    );
    agent.change(&died, |sandbox| {
        sandbox.state = SandboxState::SANDBOX_STATE_ERROR;
        sandbox.reason = "its VMM was killed".to_owned();
    });
    agent.lose(&lost);
    let row = control.until_status(&died, "error").await;
    assert_eq!(row["error"], "its VMM was killed");
    let row = control.until_status(&lost, "error").await;
    assert!(
        row["error"].as_str().unwrap().contains("no longer"),
        "{row}"
    );
    let got = control
        .post(
            &format!("/v1/sandboxes/{died}/exec"),
            json!({ "cmd": "echo" }),
        )
        .await;
    assert_failure(
        &got,
        409,
        "invalid_state",
        &["`error`", "its VMM was killed"],
    );
    let got = Socket::try_open(
        &control,
        &format!("/v1/sandboxes/{died}/pty"),
        Some(control.key()),
    )
    .await;
    assert_failure(&got.err().unwrap(), 409, "invalid_state", &["`error`"]);
    until("the loss is acknowledged to the host", async || {
        (agent.ids() == [lives.as_str()]).then_some(())
    })
    .await;
    assert_eq!(control.status(&lives).await, "running");
    assert_eq!(
        control.delete(&format!("/v1/sandboxes/{died}")).await.0,
        StatusCode::NO_CONTENT
    );
    assert_eq!(control.status(&died).await, "stopped");
}

#[tokio::test]
async fn frequent_reconciler_never_mistakes_a_create_for_a_loss_or_an_orphan() {
    let agent = FakeAgent::start().await;
    let control = Control::start_with(&agent, eager()).await;
    *agent.state.create_delay.lock().unwrap() = Duration::from_millis(30);
    for _ in 0..10 {
        let creates = (0..4).map(|_| control.post("/v1/sandboxes", json!({})));
        for (status, made) in futures::future::join_all(creates).await {
            assert_eq!(
                (status, &made["status"]),
                (StatusCode::CREATED, &json!("running")),
                "{made}"
            );
        }
    }
    let (_, list) = control.get("/v1/sandboxes?status=running").await;
    assert_eq!(list.as_array().unwrap().len(), 40);
    assert_eq!(agent.ids().len(), 40);
    assert_eq!(agent.calls("DestroySandbox"), 0);
}

#[tokio::test]
async fn lost_replies_of_lists_and_destroys_are_repaired() {
    let agent = FakeAgent::start().await;
    let control = Control::start_with(&agent, eager()).await;
    let id = control.create().await;
    agent.drop_replies("ListSandboxes", 5);
    agent.drop_replies("DestroySandbox", 1);
    let (status, _) = control.delete(&format!("/v1/sandboxes/{id}")).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    control.until_status(&id, "stopped").await;
}

#[tokio::test]
async fn idle_sandboxes_are_paused_or_destroyed_as_they_were_created() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let make = async |body: Value| {
        let (status, made) = control.post("/v1/sandboxes", body).await;
        assert_eq!(status, StatusCode::CREATED, "{made}");
        made["id"].as_str().unwrap().to_owned()
    };
    let paused = make(json!({ "timeout_sec": 1 })).await;
    let killed = make(json!({ "timeout_sec": 1, "on_timeout": "kill" })).await;
    let forever = make(json!({ "timeout_sec": 0 })).await;
    let patient = make(json!({ "timeout_sec": 3600 })).await;
    let used = make(json!({ "timeout_sec": 5, "on_timeout": "kill" })).await;
    let mut socket = Socket::open(&control, &format!("/v1/sandboxes/{used}/pty")).await;
    socket.send(json!({ "type": "start" })).await;
    socket.expect("started").await;
    control.until_status(&paused, "paused").await;
    let row = control.until_status(&killed, "stopped").await;
    assert!(row["error"].as_str().unwrap().contains("idle"), "{row}");
    // Much later.
    agent.change(&used, |sandbox| sandbox.last_active_ms = now_ms() - 60_000);
    tokio::time::sleep(Duration::from_millis(5500)).await;
    let looks = agent.calls("ListSandboxes");
    until("the reconciler has polled again", async || {
        (agent.calls("ListSandboxes") > looks + 2).then_some(())
    })
    .await;
    for id in [&forever, &patient, &used] {
        assert_eq!(control.status(id).await, "running", "{id}");
    }
    drop(socket);
    control.until_status(&used, "stopped").await;
}

#[tokio::test]
async fn pings_keep_a_sandbox_running() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let (_, made) = control
        .post("/v1/sandboxes", json!({ "timeout_sec": 5 }))
        .await;
    let id = made["id"].as_str().unwrap();
    for _ in 0..30 {
        let (status, body) = control
            .post(&format!("/v1/sandboxes/{id}/ping"), Value::Null)
            .await;
        assert_eq!(status, StatusCode::NO_CONTENT, "{body}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(control.status(id).await, "running");
    control.until_status(id, "paused").await;
}

#[tokio::test]
async fn failed_idle_pause_leaves_a_warning_and_is_repeated() {
    let agent = FakeAgent::start().await;
    let control = Control::start_with(&agent, eager()).await;
    let begun = Instant::now();
    agent.fail(
        "PauseSandbox",
        ErrorCode::ResourceExhausted,
        "the disk is full",
    );
    let (_, made) = control
        .post("/v1/sandboxes", json!({ "timeout_sec": 1 }))
        .await;
    let id = made["id"].as_str().unwrap();
    let path = format!("/v1/sandboxes/{id}");
    let row = until("the row has a warning", async || {
        let (_, row) = control.get(&path).await;
        row["warning"]
            .as_str()
            .is_some_and(|w| w.contains("idle"))
            .then_some(row)
    })
    .await;
    assert_eq!(row["status"], "running", "{row}");
    let warning = row["warning"].as_str().unwrap();
    assert!(
        warning.contains("the disk is full") && warning.contains("next attempt"),
        "{warning}"
    );
    let (status, _) = control
        .post(&format!("{path}/exec"), json!({ "cmd": "echo" }))
        .await;
    assert_eq!(status, StatusCode::OK, "the sandbox works meanwhile");
    // A reconciler without backoff would have retried a hundred times in this second. The third
    // attempt is 6 s after the first.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let attempts = agent.calls("PauseSandbox");
    assert!(
        attempts <= 2 || begun.elapsed() > Duration::from_secs(7),
        "{attempts}"
    );
    agent.mend("PauseSandbox");
    let row = control.until_status(id, "paused").await;
    assert_eq!(row.get("warning"), None, "{row}");
}

#[tokio::test]
async fn paused_sandboxes_unknown_to_their_host_are_left_alone() {
    let agent = FakeAgent::start().await;
    let control = Control::start_with(&agent, eager()).await;
    let (kept, gone) = (control.create().await, control.create().await);
    for id in [&kept, &gone] {
        let (status, row) = control
            .post(&format!("/v1/sandboxes/{id}/pause"), Value::Null)
            .await;
        assert_eq!(status, StatusCode::OK, "{row}");
    }
    agent.lose(&gone);
    let (status, error) = control
        .post(&format!("/v1/sandboxes/{gone}/resume"), Value::Null)
        .await;
    assert_eq!(status, StatusCode::NOT_FOUND, "{error}");
    let (_, row) = control.get(&format!("/v1/sandboxes/{gone}")).await;
    assert_eq!(row["status"], "paused", "{row}");
    let warning = row["warning"].as_str().unwrap();
    assert!(
        warning.contains("does not have the sandbox's files"),
        "{row}"
    );
    assert_eq!(control.status(&kept).await, "paused");
    let dir = control.stop().await;
    let control = Control::start_with(&agent, Options { dir, ..eager() }).await;
    assert_eq!(control.status(&kept).await, "paused");
    let (status, row) = control
        .post(&format!("/v1/sandboxes/{kept}/resume"), Value::Null)
        .await;
    assert_eq!(
        (status, &row["status"]),
        (StatusCode::OK, &json!("running")),
        "{row}"
    );
}

#[tokio::test]
async fn interrupted_operations_are_settled_by_the_report_of_the_host() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    // A control plane that shuts down while the host works leaves a row `pausing` or `resuming`.
    for (resuming, found, wanted) in [
        (false, SandboxState::SANDBOX_STATE_PAUSED, "paused"),
        (false, SandboxState::SANDBOX_STATE_RUNNING, "running"),
        (false, SandboxState::SANDBOX_STATE_ERROR, "error"),
        (true, SandboxState::SANDBOX_STATE_RUNNING, "running"),
        (true, SandboxState::SANDBOX_STATE_PAUSED, "paused"),
        (true, SandboxState::SANDBOX_STATE_ERROR, "error"),
    ] {
        let database = format!("sqlite://{}?mode=rwc", control.database().display());
        let id = control.create().await;
        let options = Options {
            poll_interval: Duration::from_secs(3600),
            database_url: Some(database),
            ..Options::default()
        };
        let other = Control::start_with(&agent, options).await;
        let path = format!("/v1/sandboxes/{id}");
        if resuming {
            assert_eq!(
                other.post(&format!("{path}/pause"), Value::Null).await.0,
                StatusCode::OK
            );
        }
        let (gate, verb, during) = if resuming {
            (&agent.state.resume_gate, "resume", "resuming")
        } else {
            (&agent.state.pause_gate, "pause", "pausing")
        };
        gate.shut();
        let call = tokio::spawn(
            other
                .request(Method::POST, &format!("{path}/{verb}"))
                .send(),
        );
        until("the host works on the call", async || {
            (gate.waiting() == 1).then_some(())
        })
        .await;
        assert_eq!(control.status(&id).await, during);
        // Shuts down without another write: its detached task is abandoned after some seconds.
        other.stop().await;
        call.abort();
        assert_eq!(
            control.status(&id).await,
            during,
            "the reconciler waits for work in progress"
        );
        agent.change(&id, |sandbox| sandbox.state = found);
        let row = control.until_status(&id, wanted).await;
        let broken_off = matches!((resuming, wanted), (false, "running") | (true, "paused"));
        assert_eq!(row.get("warning").is_some(), broken_off, "{row}");
        control.delete(&path).await;
        gate.open();
    }
}
