//! Requests to ports of sandboxes, as far as the control plane decides on them.

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::{Control, FakeAgent, answer};

async fn visit(control: &Control, id: &str, port: u16) -> (StatusCode, Value) {
    let request = reqwest::Client::new()
        .get(format!("http://{}/health", control.traffic()))
        .header("E2b-Sandbox-Id", id)
        .header("E2b-Sandbox-Port", port);
    answer(request).await
}

fn message(got: &(StatusCode, Value)) -> &str {
    got.1["message"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn a_sandbox_is_reached_while_it_runs_and_is_not_found_at_once_when_it_does_not() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.e2b_id(json!({})).await;
    let got = visit(&control, &id, 49983).await;
    assert_eq!(got.0, StatusCode::BAD_GATEWAY);
    assert!(message(&got).contains("port is not open"), "{}", got.1);
    let (status, _) = control
        .post(&format!("/sandboxes/{id}/pause"), json!({}))
        .await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let got = visit(&control, &id, 49983).await;
    assert_eq!(got.0, StatusCode::BAD_GATEWAY);
    assert!(message(&got).contains("was not found"), "{}", got.1);
    let (status, _) = control
        .post(&format!("/sandboxes/{id}/connect"), json!({}))
        .await;
    assert_eq!(status, StatusCode::CREATED);
    assert!(message(&visit(&control, &id, 49983).await).contains("port is not open"));
    assert_eq!(
        control.delete(&format!("/sandboxes/{id}")).await.0,
        StatusCode::NO_CONTENT
    );
    assert!(message(&visit(&control, &id, 49983).await).contains("was not found"));
    let unknown = visit(&control, "i00000000000000000000", 49983).await;
    assert!(message(&unknown).contains("was not found"));
}

#[tokio::test]
async fn traffic_resumes_what_was_created_so() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control
        .e2b_id(json!({ "autoPause": true, "autoResume": { "enabled": true } }))
        .await;
    let (status, _) = control
        .post(&format!("/sandboxes/{id}/pause"), json!({}))
        .await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let got = visit(&control, &id, 8080).await;
    assert!(message(&got).contains("port is not open"), "{}", got.1);
    assert_eq!(control.status(&id).await, "running");
    assert_eq!(agent.calls("ResumeSandbox"), 1);
}

#[tokio::test]
async fn a_port_asks_for_the_token_that_its_client_was_told() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control
        .e2b_id(json!({ "network": { "allowPublicTraffic": false } }))
        .await;
    assert_eq!(visit(&control, &id, 8080).await.0, StatusCode::FORBIDDEN);
    assert!(message(&visit(&control, &id, 49983).await).contains("port is not open"));
}
