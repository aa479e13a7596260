//! Steps of the wall clock, and many sandboxes whose time is over at once.

use reqwest::StatusCode;
use serde_json::{Value, json};
use wrenn_control::{clock, lifecycle::MAX_ENDS_AT_ONCE};

use crate::support::{Control, FakeAgent, until};

const HOUR_MS: i64 = 3_600_000;

/// Waits until the reconciler has made several more passes.
async fn several_passes(agent: &FakeAgent) {
    let before = agent.calls("ListSandboxes");
    until("the reconciler makes passes", async || {
        (agent.calls("ListSandboxes") > before + 3).then_some(())
    })
    .await;
}

async fn create_idle(control: &Control, timeout_sec: u32) -> String {
    let asked = json!({ "timeout_sec": timeout_sec, "on_timeout": "kill" });
    let (status, made) = control.post("/v1/sandboxes", asked).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    made["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn forward_clock_step_ends_no_sandbox() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let lives = control.e2b_id(json!({ "timeout": 600 })).await;
    let idles = create_idle(&control, 600).await;
    several_passes(&agent).await;
    clock::step(HOUR_MS);
    // The start of another sandbox with a deadline makes the deadlines be looked at.
    let new = control.e2b_id(json!({ "timeout": 600 })).await;
    several_passes(&agent).await;
    for id in [&lives, &idles, &new] {
        assert_eq!(control.status(id).await, "running");
    }
    assert_eq!(agent.calls("DestroySandbox"), 0);
}

#[tokio::test]
async fn backward_clock_step_prolongs_no_life() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let lives = control.e2b_id(json!({ "timeout": 2 })).await;
    let idles = create_idle(&control, 2).await;
    several_passes(&agent).await;
    clock::step(-HOUR_MS);
    for id in [&lives, &idles] {
        control.until_status(id, "stopped").await;
    }
}

#[tokio::test]
async fn connect_extends_the_life_after_a_backward_clock_step() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.e2b_id(json!({ "timeout": 3 })).await;
    clock::step(-HOUR_MS);
    let path = format!("/sandboxes/{id}/connect");
    let (status, body) = control.post(&path, json!({ "timeout": 600 })).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    // A deadline of the first length is over before this one.
    let other = control.e2b_id(json!({ "timeout": 4 })).await;
    control.until_status(&other, "stopped").await;
    assert_eq!(control.status(&id).await, "running");
}

#[tokio::test]
async fn ends_are_limited_to_a_batch() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.state.destroy_gate.shut();
    let mut ids = Vec::new();
    for _ in 0..MAX_ENDS_AT_ONCE {
        ids.push(control.e2b_id(json!({ "timeout": 1 })).await);
        ids.push(create_idle(&control, 1).await);
    }
    let waiting = || agent.state.destroy_gate.waiting();
    until("as many are being ended as may be", async || {
        (waiting() == MAX_ENDS_AT_ONCE).then_some(())
    })
    .await;
    several_passes(&agent).await;
    assert_eq!(waiting(), MAX_ENDS_AT_ONCE);
    agent.state.destroy_gate.open();
    until("all have ended", async || {
        agent.ids().is_empty().then_some(())
    })
    .await;
    for id in ids {
        control.until_status(&id, "stopped").await;
    }
    let (_, list) = control.get("/v2/sandboxes").await;
    assert_eq!(list, Value::Array(Vec::new()));
}
