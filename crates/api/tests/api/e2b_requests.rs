//! Creates with an idempotency key.

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};

use crate::support::{
    Control, ErrorCode, FakeAgent, answer, assert_e2b_failure, create_and_leave, until,
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
    assert_e2b_failure(&got, 422, &["another request"]);
    let (_, second) = answer(named(&control, "a-2", &body())).await;
    assert_ne!(second["sandboxID"], first["sandboxID"]);
    assert_eq!(agent.calls("CreateSandbox"), 2);
    for bad in ["", "A", "a_b", &"a".repeat(256)] {
        let got = answer(named(&control, bad, &body())).await;
        assert_e2b_failure(&got, 400, &["Idempotency-Key"]);
    }
    let id = first["sandboxID"].as_str().unwrap();
    assert_eq!(
        control.delete(&format!("/sandboxes/{id}")).await.0,
        StatusCode::NO_CONTENT
    );
    let got = answer(named(&control, "a-1", &body())).await;
    assert_e2b_failure(&got, 409, &["has ended"]);
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
