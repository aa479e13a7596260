//! Pause and resume, and their failures.

use std::{sync::atomic::Ordering, time::Duration};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use wrenn_proto::rpc::hostagent::v1::SandboxState;

use crate::support::{Control, ErrorCode, FakeAgent, Options, assert_failure, until};

async fn pause(control: &Control, id: &str) -> (StatusCode, Value) {
    control
        .post(&format!("/v1/sandboxes/{id}/pause"), Value::Null)
        .await
}

async fn resume(control: &Control, id: &str) -> (StatusCode, Value) {
    control
        .post(&format!("/v1/sandboxes/{id}/resume"), Value::Null)
        .await
}

#[tokio::test]
async fn a_sandbox_is_paused_and_resumed_under_both_names() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    for prefix in ["sandboxes", "capsules"] {
        let path = format!("/v1/{prefix}/{id}");
        let (status, row) = control.post(&format!("{path}/pause"), Value::Null).await;
        assert_eq!(
            (status, &row["status"]),
            (StatusCode::OK, &json!("paused")),
            "{row}"
        );
        assert_eq!(
            agent.sandbox(&id).unwrap().state,
            SandboxState::SANDBOX_STATE_PAUSED
        );
        let got = control.post(&format!("{path}/pause"), Value::Null).await;
        assert_failure(&got, 409, "invalid_state", &["`paused`", "`running`"]);
        let (_, list) = control.get(&format!("/v1/{prefix}?status=paused")).await;
        assert_eq!(list[0]["id"], id);
        let (status, row) = control.post(&format!("{path}/resume"), Value::Null).await;
        assert_eq!(
            (status, &row["status"]),
            (StatusCode::OK, &json!("running")),
            "{row}"
        );
        let got = control.post(&format!("{path}/resume"), Value::Null).await;
        assert_failure(&got, 409, "invalid_state", &["`running`", "`paused`"]);
        let (status, _) = control
            .post(&format!("{path}/exec"), json!({ "cmd": "echo" }))
            .await;
        assert_eq!(status, StatusCode::OK);
    }
    assert_eq!(
        (agent.calls("PauseSandbox"), agent.calls("ResumeSandbox")),
        (2, 2)
    );
    assert_eq!(pause(&control, &id).await.0, StatusCode::OK);
    assert_eq!(
        control.delete(&format!("/v1/sandboxes/{id}")).await.0,
        StatusCode::NO_CONTENT
    );
    assert!(agent.ids().is_empty());
    assert_failure(
        &resume(&control, &id).await,
        409,
        "invalid_state",
        &["`stopped`"],
    );
}

#[tokio::test]
async fn a_resume_without_memory_boots_from_the_disk() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let path = format!("/v1/sandboxes/{id}/resume");
    for (body, boots) in [
        (json!({ "memory": false }), true),
        (json!({ "memory": true }), false),
        (json!({}), false),
    ] {
        pause(&control, &id).await;
        let (status, row) = control.post(&path, body.clone()).await;
        assert_eq!(
            (status, &row["status"]),
            (StatusCode::OK, &json!("running"))
        );
        let booted = agent.state.cold_boot.load(Ordering::SeqCst);
        assert_eq!(booted, boots, "{body}");
    }
    pause(&control, &id).await;
    let got = control.post(&path, json!({ "disk": true })).await;
    assert_failure(&got, 400, "invalid_request", &["disk"]);
}

#[tokio::test]
async fn failed_pause_keeps_running_and_a_failed_resume_can_be_repeated() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let row = async || control.get(&format!("/v1/sandboxes/{id}")).await.1;
    agent.fail(
        "PauseSandbox",
        ErrorCode::ResourceExhausted,
        "the disk is full",
    );
    let got = pause(&control, &id).await;
    assert_failure(
        &got,
        503,
        "resource_exhausted",
        &["the disk is full", "is now `running`"],
    );
    let now = row().await;
    assert_eq!(now["status"], "running");
    assert!(
        now["warning"]
            .as_str()
            .unwrap()
            .contains("the disk is full"),
        "{now}"
    );
    let (status, _) = control
        .post(
            &format!("/v1/sandboxes/{id}/exec"),
            json!({ "cmd": "echo" }),
        )
        .await;
    assert_eq!(status, StatusCode::OK);
    agent.fail("PauseSandbox", ErrorCode::Internal, "the header is damaged");
    assert_failure(
        &pause(&control, &id).await,
        502,
        "agent_error",
        &["the header is damaged", "is now `running`"],
    );
    agent.mend("PauseSandbox");
    let (status, now) = pause(&control, &id).await;
    assert_eq!(
        (status, now.get("warning")),
        (StatusCode::OK, None),
        "{now}"
    );

    agent.fail(
        "ResumeSandbox",
        ErrorCode::Unavailable,
        "the guest does not answer",
    );
    let got = resume(&control, &id).await;
    assert_failure(
        &got,
        503,
        "unavailable",
        &["the guest does not answer", "is now `paused`"],
    );
    let now = row().await;
    assert_eq!(now["status"], "paused");
    assert!(
        now["warning"].as_str().unwrap().contains("does not answer"),
        "{now}"
    );
    agent.mend("ResumeSandbox");
    let (status, now) = resume(&control, &id).await;
    assert_eq!(
        (status, now.get("warning")),
        (StatusCode::OK, None),
        "{now}"
    );
}

#[tokio::test]
async fn lost_reply_does_not_change_the_outcome() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    // The host has paused the sandbox, so the call succeeds.
    agent.drop_replies("PauseSandbox", 1);
    let (status, row) = pause(&control, &id).await;
    assert_eq!(
        (status, &row["status"]),
        (StatusCode::OK, &json!("paused")),
        "{row}"
    );
    agent.drop_replies("ResumeSandbox", 1);
    let (status, row) = resume(&control, &id).await;
    assert_eq!(
        (status, &row["status"]),
        (StatusCode::OK, &json!("running")),
        "{row}"
    );
    // The list call after it is lost, too. The reconciler notices the pause later.
    agent.drop_replies("PauseSandbox", 1);
    agent.drop_replies("ListSandboxes", 3);
    let got = pause(&control, &id).await;
    if got.0 != StatusCode::OK {
        assert_failure(&got, 503, "unavailable", &["does not answer"]);
    }
    control.until_status(&id, "paused").await;
}

#[tokio::test]
async fn sandbox_lost_during_a_pause_is_an_error() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    for lost in [true, false] {
        let id = control.create().await;
        agent.state.pause_gate.shut();
        agent.drop_replies("PauseSandbox", 1);
        let path = format!("/v1/sandboxes/{id}/pause");
        let call = tokio::spawn(control.request(Method::POST, &path).send());
        until("the host works on the call", async || {
            (agent.state.pause_gate.waiting() == 1).then_some(())
        })
        .await;
        if lost {
            agent.lose(&id);
        }
        agent.fail("PauseSandbox", ErrorCode::Internal, "broken");
        agent.state.pause_gate.open();
        assert!(!call.await.unwrap().unwrap().status().is_success());
        if lost {
            let row = control.until_status(&id, "error").await;
            assert!(row["error"].as_str().unwrap().contains("lost"), "{row}");
        } else {
            assert_eq!(control.status(&id).await, "running");
        }
        agent.mend("PauseSandbox");
    }
}

#[tokio::test]
async fn restart_of_the_agent_during_a_pause_is_settled() {
    let mut agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    for finishes in [true, false] {
        let id = control.create().await;
        agent.state.pause_gate.shut();
        let path = format!("/v1/sandboxes/{id}/pause");
        let call = tokio::spawn(control.request(Method::POST, &path).send());
        until("the host works on the call", async || {
            (agent.state.pause_gate.waiting() == 1).then_some(())
        })
        .await;
        agent.down().await;
        let answered = call.await.unwrap().unwrap();
        assert_eq!(answered.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(answered.text().await.unwrap().contains("`pausing`"));
        assert_eq!(control.status(&id).await, "pausing");
        agent.up().await;
        assert_failure(
            &resume(&control, &id).await,
            409,
            "invalid_state",
            &["`pausing`"],
        );
        if finishes {
            agent.state.pause_gate.open();
            control.until_status(&id, "paused").await;
        } else {
            agent.change(&id, |sandbox| {
                sandbox.state = SandboxState::SANDBOX_STATE_RUNNING
            });
            let row = control.until_status(&id, "running").await;
            assert!(
                row["warning"].as_str().unwrap().contains("interrupted"),
                "{row}"
            );
            agent.state.pause_gate.open();
        }
        assert_eq!(
            control.delete(&format!("/v1/sandboxes/{id}")).await.0,
            StatusCode::NO_CONTENT
        );
    }
}

#[tokio::test]
async fn frequent_reconciler_does_not_disturb_a_pause_or_a_resume() {
    let agent = FakeAgent::start().await;
    let options = Options {
        poll_interval: Duration::from_millis(10),
        ..Options::default()
    };
    let control = Control::start_with(&agent, options).await;
    let id = control.create().await;
    for (gate, verb, during, after) in [
        (&agent.state.pause_gate, "pause", "pausing", "paused"),
        (&agent.state.resume_gate, "resume", "resuming", "running"),
    ] {
        gate.shut();
        let path = format!("/v1/sandboxes/{id}/{verb}");
        let call = tokio::spawn(control.request(Method::POST, &path).send());
        until("the host works on the call", async || {
            (gate.waiting() == 1).then_some(())
        })
        .await;
        // Meanwhile, the host lists contradictory states.
        for wrong in [
            SandboxState::SANDBOX_STATE_RUNNING,
            SandboxState::SANDBOX_STATE_PAUSED,
            SandboxState::SANDBOX_STATE_ERROR,
        ] {
            agent.change(&id, |sandbox| sandbox.state = wrong);
            let looks = agent.calls("ListSandboxes");
            until("the reconciler has polled ten times", async || {
                (agent.calls("ListSandboxes") > looks + 10).then_some(())
            })
            .await;
            assert_eq!(control.status(&id).await, during);
        }
        gate.open();
        assert_eq!(call.await.unwrap().unwrap().status(), StatusCode::OK);
        assert_eq!(control.status(&id).await, after);
    }
    assert_eq!(agent.calls("DestroySandbox"), 0);
}

#[tokio::test]
async fn disconnect_does_not_stop_a_pause() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    for (gate, verb, after) in [
        (&agent.state.pause_gate, "pause", "paused"),
        (&agent.state.resume_gate, "resume", "running"),
    ] {
        gate.shut();
        let path = format!("/v1/sandboxes/{id}/{verb}");
        let call = tokio::spawn(control.request(Method::POST, &path).send());
        until("the host works on the call", async || {
            (gate.waiting() == 1).then_some(())
        })
        .await;
        call.abort();
        let _ = call.await;
        gate.open();
        control.until_status(&id, after).await;
    }
}
