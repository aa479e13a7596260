//! Creates with an idempotency key.

use std::time::Duration;

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use sqlx::Connection as _;
use wrenn_control::Limits;

use crate::support::{
    Control, ErrorCode, FakeAgent, Options, answer, assert_e2b_failure, create_and_leave, until,
};

fn named(control: &Control, key: &str, body: &Value) -> RequestBuilder {
    control
        .request(Method::POST, "/v2/sandboxes")
        .header("Idempotency-Key", key)
        .json(body)
}

fn body() -> Value {
    json!({ "templateID": "minimal", "metadata": {}, "envVars": {} })
}

#[tokio::test]
async fn repeated_request_returns_the_same_sandbox_and_a_different_one_is_rejected() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let (status, first) = answer(named(&control, "a-1", &body())).await;
    assert_eq!(status, StatusCode::CREATED);
    let (status, again) = answer(named(&control, "a-1", &body())).await;
    assert_eq!((status, &again), (StatusCode::CREATED, &first));
    let other = json!({ "templateID": "minimal", "timeout": 9 });
    let got = answer(named(&control, "a-1", &other)).await;
    assert_e2b_failure(&got, 409, &["another request"]);
    assert_eq!(got.1["error_code"], "idempotency_request_mismatch");
    let (_, second) = answer(named(&control, "a-2", &body())).await;
    assert_ne!(second["sandboxID"], first["sandboxID"]);
    assert_eq!(agent.calls("CreateSandbox"), 2);
    for bad in ["", "A", "a_b", &"a".repeat(256)] {
        let got = answer(named(&control, bad, &body())).await;
        assert_e2b_failure(&got, 400, &["Idempotency-Key"]);
    }
    // The answer stays the first one, whatever becomes of the sandbox.
    let id = first["sandboxID"].as_str().unwrap();
    let pause = format!("/sandboxes/{id}/pause");
    let (status, _) = control.post(&pause, json!({})).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let replay = async || answer(named(&control, "a-1", &body())).await;
    assert_eq!(replay().await, (StatusCode::CREATED, first.clone()));
    assert_eq!(control.status(id).await, "paused");
    assert_eq!(
        control.delete(&format!("/sandboxes/{id}")).await.0,
        StatusCode::NO_CONTENT
    );
    assert_eq!(replay().await, (StatusCode::CREATED, first.clone()));
    assert_eq!(agent.calls("CreateSandbox"), 2);
}

/// Options of a control plane in which a request does not wait long for another one.
fn impatient(dir: std::sync::Arc<tempfile::TempDir>) -> Options {
    Options {
        dir,
        limits: Limits {
            idempotency_wait: Duration::from_millis(100),
            ..Limits::default()
        },
        poll_interval: Duration::from_secs(3600),
        ..Options::default()
    }
}

#[tokio::test]
async fn repeat_of_a_request_in_progress_is_rejected() {
    let agent = FakeAgent::start().await;
    let dir = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let control = Control::start_with(&agent, impatient(dir)).await;
    agent.state.create_gate.shut();
    let (first, ()) = tokio::join!(answer(named(&control, "k", &body())), async {
        until("the host receives the create", async || {
            (agent.state.create_gate.waiting() == 1).then_some(())
        })
        .await;
        let got = answer(named(&control, "k", &body())).await;
        assert_e2b_failure(&got, 409, &["in progress"]);
        assert_eq!(got.1["error_code"], "idempotency_in_progress");
        agent.state.create_gate.open();
    });
    assert_eq!(first.0, StatusCode::CREATED, "{}", first.1);
    assert_eq!(agent.calls("CreateSandbox"), 1);
}

#[tokio::test]
async fn repeat_of_a_request_with_unknown_outcome_is_rejected() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let (_, first) = answer(named(&control, "k", &body())).await;
    let dir = control.stop().await;
    // What a process leaves behind that is killed in the middle of the create.
    agent.lose(first["sandboxID"].as_str().unwrap());
    let rows = format!("sqlite://{}/wrenn.db", dir.path().display());
    let mut rows = sqlx::SqliteConnection::connect(&rows).await.unwrap();
    let left = sqlx::query("UPDATE sandboxes SET status = 'starting', started_at = 0");
    assert_eq!(left.execute(&mut rows).await.unwrap().rows_affected(), 1);
    rows.close().await.unwrap();
    let control = Control::start_with(&agent, impatient(dir)).await;
    let got = answer(named(&control, "k", &body())).await;
    assert_e2b_failure(&got, 422, &["unknown"]);
    assert_eq!(got.1["error_code"], "idempotency_outcome_unknown");
}

#[tokio::test]
async fn requests_at_the_same_time_share_one_create() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.state.create_gate.shut();
    let ask = async || answer(named(&control, "k", &body())).await;
    let (a, b, c, ()) = tokio::join!(ask(), ask(), ask(), async {
        until("the host receives the create", async || {
            (agent.state.create_gate.waiting() == 1).then_some(())
        })
        .await;
        agent.state.create_gate.open();
    });
    assert_eq!(a.0, StatusCode::CREATED, "{}", a.1);
    assert_eq!((&a, &a), (&b, &c));
    assert_eq!(agent.calls("CreateSandbox"), 1);
}

#[tokio::test]
async fn request_of_a_disconnected_client_can_be_repeated() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.state.create_gate.shut();
    create_and_leave(&agent, named(&control, "k", &body())).await;
    let (again, ()) = tokio::join!(answer(named(&control, "k", &body())), async {
        until("the first create is being undone", async || {
            (agent.calls("DestroySandbox") > 0).then_some(())
        })
        .await;
        assert_eq!(agent.calls("CreateSandbox"), 1);
        agent.state.create_gate.open();
    });
    assert_eq!(agent.calls("CreateSandbox"), 2);
    assert_eq!(again.0, StatusCode::CREATED, "{}", again.1);
    let id = again.1["sandboxID"].as_str().unwrap().to_owned();
    until("only the second sandbox exists", async || {
        (agent.ids() == [id.clone()]).then_some(())
    })
    .await;
    assert_eq!(control.status(&id).await, "running");
}

#[tokio::test]
async fn failed_request_can_be_repeated() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.fail("CreateSandbox", ErrorCode::Unavailable, "not now");
    let response = named(&control, "k", &body()).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(!response.headers().contains_key("should-retry"));
    agent.mend("CreateSandbox");
    let (status, made) = answer(named(&control, "k", &body())).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
}

#[tokio::test]
async fn idempotency_key_survives_a_restart() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let (_, first) = answer(named(&control, "k", &body())).await;
    let dir = control.stop().await;
    let options = crate::support::Options {
        dir,
        ..Default::default()
    };
    let control = Control::start_with(&agent, options).await;
    let (status, again) = answer(named(&control, "k", &body())).await;
    assert_eq!((status, again), (StatusCode::CREATED, first));
}
