//! Connects to a paused sandbox when the resume fails, or when its result is lost.

use std::{sync::atomic::Ordering, time::Duration};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use wrenn_proto::rpc::hostagent::v1::SandboxState;

use crate::support::{Control, ErrorCode, FakeAgent, Options, assert_e2b_failure, until};

async fn pause(control: &Control, id: &str, body: Value) {
    let path = format!("/sandboxes/{id}/pause");
    assert_eq!(control.post(&path, body).await.0, StatusCode::NO_CONTENT);
}

async fn connect(control: &Control, id: &str, body: Value) -> (StatusCode, Value) {
    let path = format!("/v2/sandboxes/{id}/connect");
    control.post(&path, body).await
}

async fn pause_mode(control: &Control, id: &str) -> Value {
    control.get(&format!("/sandboxes/{id}")).await.1["pauseMode"].clone()
}

/// Returns the remaining lifetime, in seconds.
async fn left(control: &Control, id: &str) -> i64 {
    let (_, seen) = control.get(&format!("/sandboxes/{id}")).await;
    let end: jiff::Timestamp = seen["endAt"].as_str().unwrap().parse().unwrap();
    end.as_second() - jiff::Timestamp::now().as_second()
}

/// Starts a connect on a control plane that shuts down while the host works on it. The row stays
/// `resuming`.
async fn broken_off(agent: &FakeAgent, control: &Control, id: &str, body: Value) {
    let options = Options {
        poll_interval: Duration::from_secs(3600),
        database_url: Some(format!(
            "sqlite://{}?mode=rwc",
            control.database().display()
        )),
        ..Options::default()
    };
    let other = Control::start_with(agent, options).await;
    agent.state.resume_gate.shut();
    let path = format!("/v2/sandboxes/{id}/connect");
    let call = other.request(Method::POST, &path).json(&body);
    let call = tokio::spawn(call.send());
    until("the host works on the call", async || {
        (agent.state.resume_gate.waiting() == 1).then_some(())
    })
    .await;
    other.stop().await;
    call.abort();
    assert_eq!(control.status(id).await, "resuming");
}

#[tokio::test]
async fn failed_cold_boot_keeps_the_memory() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let booted = || agent.state.cold_boot.load(Ordering::SeqCst);
    for (paused, mode) in [
        (json!({}), "full"),
        (json!({ "memory": false }), "filesystem"),
    ] {
        let id = control.e2b_id(json!({})).await;
        pause(&control, &id, paused).await;
        agent.fail(
            "ResumeSandbox",
            ErrorCode::ResourceExhausted,
            "no room left",
        );
        let got = connect(&control, &id, json!({ "memory": false })).await;
        assert_e2b_failure(&got, 503, &["no room left"]);
        assert!(booted());
        assert_eq!(pause_mode(&control, &id).await, mode);
        agent.mend("ResumeSandbox");
        let got = connect(&control, &id, json!({})).await;
        assert_eq!(got.0, StatusCode::CREATED, "{}", got.1);
        assert_eq!(booted(), mode == "filesystem");
    }
}

#[tokio::test]
async fn settings_of_an_interrupted_resume_apply_to_that_resume_only() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let wanted = json!({ "memory": false, "timeout": 5000 });
    let id = control.e2b_id(json!({ "timeout": 100 })).await;
    pause(&control, &id, json!({})).await;
    broken_off(&agent, &control, &id, wanted.clone()).await;
    agent.change(&id, |sandbox| {
        sandbox.state = SandboxState::SANDBOX_STATE_PAUSED;
    });
    control.until_status(&id, "paused").await;
    assert_eq!(pause_mode(&control, &id).await, "full");
    agent.state.resume_gate.open();
    let got = control
        .post(&format!("/v1/sandboxes/{id}/resume"), Value::Null)
        .await;
    assert_eq!(got.0, StatusCode::OK, "{}", got.1);
    assert!(!agent.state.cold_boot.load(Ordering::SeqCst));
    let lives = left(&control, &id).await;
    assert!((90..=100).contains(&lives), "{lives}");

    let id = control.e2b_id(json!({ "timeout": 100 })).await;
    pause(&control, &id, json!({})).await;
    broken_off(&agent, &control, &id, wanted).await;
    agent.change(&id, |sandbox| {
        sandbox.state = SandboxState::SANDBOX_STATE_RUNNING;
    });
    control.until_status(&id, "running").await;
    let lives = left(&control, &id).await;
    assert!((4990..=5000).contains(&lives), "{lives}");
    agent.state.resume_gate.open();
}

#[tokio::test]
async fn requested_lifetime_applies_even_if_the_reply_is_lost() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.e2b_id(json!({ "timeout": 100 })).await;
    pause(&control, &id, json!({})).await;
    agent.drop_replies("ResumeSandbox", 1);
    let (status, body) = connect(&control, &id, json!({ "timeout": 1000 })).await;
    assert_eq!(status, StatusCode::CREATED, "{body}");
    let lives = left(&control, &id).await;
    assert!((990..=1000).contains(&lives), "{lives}");
}
