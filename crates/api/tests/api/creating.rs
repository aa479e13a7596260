//! Creates: response times, and cleanup after creates whose client has disconnected.

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::{
    Control, ErrorCode, FakeAgent, NOT_STOPPED, Options, assert_failure, create_and_leave, until,
};

#[tokio::test]
async fn create_responds_within_5_s_while_the_vm_boots() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.state.create_gate.shut();
    let begun = Instant::now();
    let (status, made) = control.post("/v1/sandboxes", json!({})).await;
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(status, StatusCode::CREATED, "{made}");
    assert_eq!(made["status"], "starting");
    let id = made["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/sandboxes/{id}");
    // Calls that cannot wait for the boot fail; the others wait and succeed once the sandbox runs.
    for route in ["pause", "resume", "fork"] {
        let got = control.post(&format!("{path}/{route}"), Value::Null).await;
        assert_failure(&got, 409, "invalid_state", &["`starting`"]);
    }
    let got = control
        .post("/v1/snapshots", json!({ "sandbox_id": id }))
        .await;
    assert_failure(&got, 409, "invalid_state", &["`starting`"]);
    let exec_path = format!("{path}/exec");
    let (ping_path, metrics_path) = (format!("{path}/ping"), format!("{path}/metrics"));
    let mut waiting = std::pin::pin!(async {
        tokio::join!(
            control.post(&exec_path, json!({ "cmd": "echo", "args": ["late"] })),
            control.post(&ping_path, Value::Null),
            control.get(&metrics_path),
        )
    });
    tokio::select! {
        got = &mut waiting => panic!("{got:?}"),
        () = tokio::time::sleep(Duration::from_millis(200)) => {}
    }
    agent.state.create_gate.open();
    let ((status, done), pinged, metrics) = waiting.await;
    assert_eq!(pinged.0, StatusCode::NO_CONTENT, "{pinged:?}");
    assert_eq!(metrics.0, StatusCode::OK, "{metrics:?}");
    assert_eq!(
        (status, &done["stdout"]),
        (StatusCode::OK, &json!("late\n")),
        "{done}"
    );
    assert_eq!(control.status(&id).await, "running");
}

#[tokio::test]
async fn failed_create_is_reported_and_recorded() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    for (code, status, word) in [
        (ErrorCode::ResourceExhausted, 503, "resource_exhausted"),
        (ErrorCode::InvalidArgument, 400, "invalid_request"),
        (ErrorCode::DeadlineExceeded, 504, "timeout"),
    ] {
        agent.fail("CreateSandbox", code, "no memory left");
        let got = control.post("/v1/sandboxes", json!({})).await;
        assert_failure(&got, status, word, &["no memory left", "(sandbox sb-"]);
    }
    let (_, list) = control.get("/v1/sandboxes?status=error").await;
    assert_eq!(list.as_array().unwrap().len(), 3);
    for row in list.as_array().unwrap() {
        assert_eq!(row["error"], "no memory left");
    }
    assert!(agent.ids().is_empty());
}

#[tokio::test]
async fn create_with_a_lost_reply_leaves_nothing_at_the_host() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.drop_replies("CreateSandbox", 1);
    let got = control.post("/v1/sandboxes", json!({})).await;
    assert_failure(&got, 503, "unavailable", &["does not answer"]);
    until("the sandbox is destroyed", async || {
        agent.ids().is_empty().then_some(())
    })
    .await;
    let (_, list) = control.get("/v1/sandboxes").await;
    assert_eq!(list, json!([]), "the sandbox is not listed");
    let (_, list) = control.get("/v1/sandboxes?status=error").await;
    assert_eq!(list[0]["status"], "error", "{list}");
}

#[tokio::test]
async fn disconnect_during_a_create_leaves_nothing() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.state.create_gate.shut();
    let request = control.request(reqwest::Method::POST, "/v1/sandboxes");
    create_and_leave(&agent, request).await;
    until("the host receives the destroy", async || {
        (agent.calls("DestroySandbox") > 0).then_some(())
    })
    .await;
    agent.state.create_gate.open();
    let (_, list) = control.get("/v1/sandboxes?status=all").await;
    let id = list[0]["id"].as_str().unwrap();
    let row = control.until_status(id, "stopped").await;
    assert!(
        row["error"]
            .as_str()
            .unwrap()
            .contains("client disconnected"),
        "{row}"
    );
    until("all resources are freed", async || {
        agent.ids().is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn disconnect_at_any_time_before_the_response_leaves_nothing() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.state.create_gate.shut();
    *agent.state.create_delay.lock().unwrap() = Duration::from_millis(500);
    for moment in 0..40 {
        let send = control
            .request(reqwest::Method::POST, "/v1/sandboxes")
            .send();
        let left = tokio::time::timeout(Duration::from_millis(moment), send).await;
        assert!(left.is_err(), "{left:?}");
    }
    // A server cannot know whether a client has read a sent response. Here no response is sent
    // before the server sees the disconnect.
    until("all creates are being undone", async || {
        let (_, list) = control.get(NOT_STOPPED).await;
        let rows = list.as_array().unwrap();
        rows.iter()
            .all(|row| row["status"] == "stopping")
            .then_some(())
    })
    .await;
    agent.state.create_gate.open();
    until("all resources are freed", async || {
        let (_, list) = control.get(NOT_STOPPED).await;
        (list == json!([]) && agent.ids().is_empty()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_destroy_during_a_create_wins() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.state.create_gate.shut();
    let (_, made) = control.post("/v1/sandboxes", json!({})).await;
    let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
    let destroy = tokio::spawn(control.request(reqwest::Method::DELETE, &path).send());
    until("the host receives the call", async || {
        (agent.calls("DestroySandbox") > 0).then_some(())
    })
    .await;
    agent.state.create_gate.open();
    assert_eq!(
        destroy.await.unwrap().unwrap().status(),
        StatusCode::NO_CONTENT
    );
    assert_eq!(control.get(&path).await.1["status"], "stopped");
    assert!(agent.ids().is_empty());
}

#[tokio::test]
async fn creates_respond_in_time_if_the_host_does_not() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.state.host_gate.shut();
    let begun = Instant::now();
    let creates = (0..10).map(|_| control.post("/v1/sandboxes", json!({})));
    for got in futures::future::join_all(creates).await {
        assert_failure(&got, 504, "timeout", &[]);
    }
    // Sequential calls would take 20 s.
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "calls were sequential: {:?}",
        begun.elapsed()
    );
    agent.state.host_gate.open();
    until("the host receives the second call", async || {
        (control.post("/v1/sandboxes", json!({})).await.0 == StatusCode::CREATED).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_unreachable_host_is_503_and_comes_back() {
    let mut agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    agent.down().await;
    let path = format!("/v1/sandboxes/{id}");
    until("the cached host facts have expired", async || {
        let got = control.post("/v1/sandboxes", json!({})).await;
        (got.0 == StatusCode::SERVICE_UNAVAILABLE).then_some(())
    })
    .await;
    let got = control
        .post(&format!("{path}/exec"), json!({ "cmd": "echo" }))
        .await;
    assert_failure(&got, 503, "unavailable", &["does not answer"]);
    assert_eq!(
        control.status(&id).await,
        "running",
        "the status does not change while the host is down"
    );
    let (_, templates) = control.get("/v1/templates").await;
    assert_eq!(
        templates[0]["name"], "minimal",
        "the stored templates are listed"
    );
    let got = control.delete(&path).await;
    assert_failure(
        &got,
        503,
        "unavailable",
        &["`stopping`", "will be destroyed"],
    );
    assert_eq!(control.status(&id).await, "stopping");
    agent.up().await;
    control.until_status(&id, "stopped").await;
    assert!(agent.ids().is_empty());
    control.create().await;
}

#[tokio::test]
async fn parameters_of_a_create_reach_the_host() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let body = json!({
        "template": "minimal", "vcpus": 2, "memory_mb": 1024, "disk_size_mb": 2048, "timeout_sec": 0,
        "egress": "allow", "envs": { "A": "1" }
    });
    let (status, made) = control.post("/v1/capsules", body).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let sent = agent.last_create();
    assert_eq!(
        (
            sent.vcpus,
            sent.memory_mb,
            sent.disk_size_mb,
            sent.timeout_sec
        ),
        (2, 1024, 2048, 0)
    );
    assert_eq!(sent.envs["A"], "1");
    assert_eq!(
        sent.egress.as_known(),
        Some(wrenn_proto::rpc::hostagent::v1::Egress::EGRESS_ALLOW)
    );
    let (_, made) = control.post("/v1/sandboxes", Value::Null).await;
    assert_eq!(
        (&made["vcpus"], &made["memory_mb"], &made["timeout_sec"]),
        (&json!(1), &json!(256), &json!(300))
    );
    assert_eq!(
        (&made["on_timeout"], &made["auto_resume"]),
        (&json!("pause"), &json!(false))
    );
}

#[tokio::test]
async fn restarted_control_plane_settles_interrupted_operations() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let running = control.create().await;
    agent.state.create_gate.shut();
    let (_, made) = control.post("/v1/sandboxes", json!({})).await;
    let booting = made["id"].as_str().unwrap().to_owned();
    let dir = control.stop().await;
    agent.plant(
        "sb-orphan",
        wrenn_proto::rpc::hostagent::v1::SandboxState::SANDBOX_STATE_RUNNING,
    );
    let options = Options {
        dir,
        ..Options::default()
    };
    let control = Control::start_with(&agent, options).await;
    assert_eq!(control.status(&running).await, "running");
    assert_eq!(control.status(&booting).await, "starting");
    agent.state.create_gate.open();
    let row = control.until_status(&booting, "running").await;
    assert_eq!(row["host_ip"], "10.11.0.1");
    // No database knows it: only a command destroys it.
    assert!(agent.sandbox("sb-orphan").is_some());
    assert_eq!(agent.calls("DestroySandbox"), 0);
}
