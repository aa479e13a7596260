//! Calls to paused sandboxes: rejected, or resuming the sandbox first.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{Control, ErrorCode, FakeAgent, Socket, assert_failure, until};

async fn pause(control: &Control, id: &str) -> (StatusCode, Value) {
    control
        .post(&format!("/v1/sandboxes/{id}/pause"), Value::Null)
        .await
}

async fn create(control: &Control, body: Value) -> String {
    let (status, made) = control.post("/v1/sandboxes", body).await;
    assert_eq!(
        (status, &made["status"]),
        (StatusCode::CREATED, &json!("running")),
        "{made}"
    );
    made["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn calls_to_a_paused_sandbox_are_rejected_with_a_fix() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    assert_eq!(pause(&control, &id).await.0, StatusCode::OK);
    let path = format!("/v1/sandboxes/{id}");
    let how = format!("POST {path}/resume");
    for (method, route, body) in [
        (Method::POST, "exec", json!({ "cmd": "echo" })),
        (
            Method::POST,
            "exec",
            json!({ "cmd": "echo", "background": true }),
        ),
        (Method::POST, "ping", Value::Null),
        (Method::GET, "processes", Value::Null),
        (Method::POST, "files/read", json!({ "path": "/a" })),
        (Method::POST, "files/list", json!({ "path": "/a" })),
        (Method::POST, "fork", Value::Null),
    ] {
        let got = control
            .call(method, &format!("{path}/{route}"), &body)
            .await;
        assert_failure(&got, 409, "invalid_state", &["`paused`", &how]);
    }
    for route in ["exec/stream", "pty", "processes/1/stream"] {
        let got = Socket::try_open(&control, &format!("{path}/{route}"), Some(control.key())).await;
        assert_failure(
            &got.err().unwrap(),
            409,
            "invalid_state",
            &["`paused`", &how],
        );
    }
    assert_eq!(agent.calls("ResumeSandbox"), 0);
    assert_eq!(control.status(&id).await, "paused");
}

#[tokio::test]
async fn concurrent_calls_share_one_automatic_resume() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.state.resume_gate.shut();
    let id = create(&control, json!({ "auto_resume": true, "timeout_sec": 3 })).await;
    control.until_status(&id, "paused").await;
    let exec_path = format!("/v1/sandboxes/{id}/exec");
    let calls = futures::future::join_all((0..30).map(|n: i32| {
        control.post(
            &exec_path,
            json!({ "cmd": "echo", "args": [n.to_string()] }),
        )
    }));
    let mut calls = std::pin::pin!(calls);
    tokio::select! {
        _ = &mut calls => panic!("calls must wait for the resume"),
        () = until("the host works on the call", async || (agent.state.resume_gate.waiting() == 1).then_some(())) => {}
    }
    agent.state.resume_gate.open();
    for (n, (status, done)) in calls.await.into_iter().enumerate() {
        assert_eq!(
            (status, &done["stdout"]),
            (StatusCode::OK, &json!(format!("{n}\n"))),
            "{done}"
        );
    }
    assert_eq!(agent.calls("ResumeSandbox"), 1);
}

#[tokio::test]
async fn calls_of_every_kind_resume_a_sandbox_with_auto_resume() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = create(&control, json!({ "auto_resume": true })).await;
    let path = format!("/v1/sandboxes/{id}");
    for (method, route, body) in [
        (Method::POST, "ping", Value::Null),
        (Method::GET, "processes", Value::Null),
        (
            Method::POST,
            "files/list",
            json!({ "path": agent.path("") }),
        ),
    ] {
        assert_eq!(pause(&control, &id).await.0, StatusCode::OK);
        let (status, body) = control
            .call(method, &format!("{path}/{route}"), &body)
            .await;
        assert!(status.is_success(), "{route}: {body}");
        assert_eq!(control.status(&id).await, "running");
    }
    assert_eq!(pause(&control, &id).await.0, StatusCode::OK);
    let mut socket = Socket::open(&control, &format!("{path}/exec/stream")).await;
    socket.send(json!({ "type": "start", "cmd": "echo" })).await;
    socket.expect("start").await;
    assert_eq!(pause(&control, &id).await.0, StatusCode::OK);
    let mut socket = Socket::open(&control, &format!("{path}/pty")).await;
    socket.send(json!({ "type": "start" })).await;
    socket.expect("started").await;
}

#[tokio::test]
async fn failed_resume_fails_the_waiting_calls_only() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = create(&control, json!({ "auto_resume": true })).await;
    assert_eq!(pause(&control, &id).await.0, StatusCode::OK);
    agent.fail(
        "ResumeSandbox",
        ErrorCode::ResourceExhausted,
        "no memory left",
    );
    agent.state.resume_gate.shut();
    let exec_path = format!("/v1/sandboxes/{id}/exec");
    let calls = futures::future::join_all(
        (0..10).map(|_| control.post(&exec_path, json!({ "cmd": "echo" }))),
    );
    let mut calls = std::pin::pin!(calls);
    tokio::select! {
        _ = &mut calls => panic!("calls must wait for the resume"),
        () = async {
            until("the host works on the call", async || (agent.state.resume_gate.waiting() == 1).then_some(())).await;
            // No signal shows that the other calls have read the row. Repeated status calls, which
            // start later, ensure it.
            for _ in 0..20 {
                futures::future::join_all((0..10).map(|_| control.status(&id))).await;
            }
        } => {}
    }
    agent.state.resume_gate.open();
    for got in calls.await {
        assert_failure(&got, 503, "resource_exhausted", &["no memory left"]);
    }
    assert_eq!(agent.calls("ResumeSandbox"), 1);
    assert_eq!(control.status(&id).await, "paused");
    agent.mend("ResumeSandbox");
    assert_eq!(
        control.post(&exec_path, json!({ "cmd": "echo" })).await.0,
        StatusCode::OK
    );
}

#[tokio::test]
async fn a_call_during_a_pause_waits_for_its_end_and_resumes() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = create(&control, json!({ "auto_resume": true })).await;
    agent.state.pause_gate.shut();
    let pausing = pause(&control, &id);
    let calling = async {
        until("the host works on the call", async || {
            (agent.state.pause_gate.waiting() == 1).then_some(())
        })
        .await;
        let exec_path = format!("/v1/sandboxes/{id}/exec");
        let exec = control.post(&exec_path, json!({ "cmd": "echo" }));
        let opening = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            agent.state.pause_gate.open();
        };
        tokio::join!(exec, opening).0
    };
    let (paused, called) = tokio::join!(pausing, calling);
    assert_eq!(paused.0, StatusCode::OK, "{}", paused.1);
    assert_eq!(called.0, StatusCode::OK, "{}", called.1);
    assert_eq!(control.status(&id).await, "running");
}
