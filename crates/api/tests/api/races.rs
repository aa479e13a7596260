//! Concurrent calls to one sandbox.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{Control, FakeAgent, NOT_STOPPED, Options, answer, until};

/// Sends a hundred concurrent calls and counts their statuses.
async fn storm(control: &Control, calls: &[(Method, String, Value)]) -> BTreeMap<u16, usize> {
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..100 {
        let (method, path, body) = &calls[n % calls.len()];
        let mut request = control.request(method.clone(), path);
        if !body.is_null() {
            request = request.json(body);
        }
        tasks.spawn(answer(request));
    }
    let mut counts = BTreeMap::new();
    while let Some(done) = tasks.join_next().await {
        let (status, body) = done.unwrap();
        // 503: the sandbox was paused or destroyed in the middle of a command.
        assert!(
            [200, 201, 204, 404, 409, 503].contains(&status.as_u16()),
            "{status} {body}"
        );
        if status == StatusCode::SERVICE_UNAVAILABLE {
            assert_eq!(body["error"]["code"], "unavailable", "{body}");
        }
        *counts.entry(status.as_u16()).or_default() += 1;
    }
    counts
}

fn eager() -> Options {
    Options {
        poll_interval: Duration::from_millis(10),
        ..Options::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_destroys_execs_and_creates_end_in_a_legal_state() {
    let agent = FakeAgent::start().await;
    let control = Control::start_with(&agent, eager()).await;
    for _ in 0..3 {
        let id = control.create().await;
        let path = format!("/v1/sandboxes/{id}");
        let exec = json!({ "cmd": "echo" });
        let counts = storm(
            &control,
            &[
                (Method::POST, format!("{path}/exec"), exec.clone()),
                (
                    Method::POST,
                    "/v1/sandboxes".to_owned(),
                    json!({ "metadata": { "storm": "1" } }),
                ),
                (Method::POST, format!("{path}/exec"), exec),
                (Method::DELETE, path.clone(), Value::Null),
            ],
        )
        .await;
        assert_eq!((counts[&204], counts[&201]), (25, 25), "{counts:?}");
        assert_eq!(control.status(&id).await, "stopped");
        let (_, list) = control.get(NOT_STOPPED).await;
        for row in list.as_array().unwrap() {
            let id = row["id"].as_str().unwrap();
            control.until_status(id, "running").await;
            control.delete(&format!("/v1/sandboxes/{id}")).await;
        }
        assert!(agent.ids().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_pauses_resumes_execs_and_copies_never_overlap_at_the_host() {
    let agent = FakeAgent::start().await;
    let control = Control::start_with(&agent, eager()).await;
    for auto_resume in [false, true] {
        let (_, made) = control
            .post("/v1/sandboxes", json!({ "auto_resume": auto_resume }))
            .await;
        let id = made["id"].as_str().unwrap();
        let path = format!("/v1/sandboxes/{id}");
        let counts = storm(
            &control,
            &[
                (Method::POST, format!("{path}/pause"), Value::Null),
                (Method::POST, format!("{path}/resume"), Value::Null),
                (
                    Method::POST,
                    format!("{path}/exec"),
                    json!({ "cmd": "echo" }),
                ),
                (
                    Method::POST,
                    "/v1/snapshots".to_owned(),
                    json!({ "sandbox_id": id }),
                ),
                (Method::POST, format!("{path}/fork"), Value::Null),
            ],
        )
        .await;
        assert!(counts[&200] > 0, "{counts:?}");
        assert_eq!(agent.overlaps(), 0);
        let status = control.status(id).await;
        assert!(["running", "paused"].contains(&status.as_str()), "{status}");
        // The sandbox is still usable.
        if status == "paused" {
            let (status, row) = control.post(&format!("{path}/resume"), Value::Null).await;
            assert_eq!(status, StatusCode::OK, "{row}");
        }
        let (status, _) = control
            .post(&format!("{path}/exec"), json!({ "cmd": "echo" }))
            .await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(control.status(id).await, "running");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_pauses_resumes_execs_and_destroys_leave_nothing() {
    let agent = FakeAgent::start().await;
    let control = Control::start_with(&agent, eager()).await;
    for auto_resume in [false, true] {
        let (_, made) = control
            .post("/v1/sandboxes", json!({ "auto_resume": auto_resume }))
            .await;
        let id = made["id"].as_str().unwrap();
        let path = format!("/v1/sandboxes/{id}");
        storm(
            &control,
            &[
                (Method::POST, format!("{path}/pause"), Value::Null),
                (
                    Method::POST,
                    format!("{path}/exec"),
                    json!({ "cmd": "echo" }),
                ),
                (Method::POST, format!("{path}/resume"), Value::Null),
                (Method::DELETE, path.clone(), Value::Null),
            ],
        )
        .await;
        assert_eq!(agent.overlaps(), 0);
        assert_eq!(control.status(id).await, "stopped");
        assert!(agent.ids().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_replies_and_restarts_end_in_agreement() {
    let agent = FakeAgent::start().await;
    let control = Arc::new(Control::start_with(&agent, eager()).await);
    let ids = [
        control.create().await,
        control.create().await,
        control.create().await,
    ];
    let mut tasks = tokio::task::JoinSet::new();
    for (n, id) in ids.iter().cycle().take(60).enumerate() {
        let (control, id) = (Arc::clone(&control), id.clone());
        if n % 6 == 0 {
            agent.drop_replies("PauseSandbox", 1);
            agent.drop_replies("ResumeSandbox", 1);
            agent.drop_replies("ListSandboxes", 1);
        }
        let verb = if n % 2 == 0 { "pause" } else { "resume" };
        tasks.spawn(async move {
            let (status, body) = control
                .post(&format!("/v1/sandboxes/{id}/{verb}"), Value::Null)
                .await;
            assert!(
                [200, 409, 503].contains(&status.as_u16()),
                "{status} {body}"
            );
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    for method in ["PauseSandbox", "ResumeSandbox", "ListSandboxes"] {
        agent.drop_replies(method, 0);
    }
    for id in &ids {
        until("the rows agree with the host", async || {
            use wrenn_proto::rpc::hostagent::v1::SandboxState as S;
            let host = agent.sandbox(id).unwrap().state;
            let status = control.status(id).await;
            matches!(
                (status.as_str(), host),
                ("running", S::SANDBOX_STATE_RUNNING) | ("paused", S::SANDBOX_STATE_PAUSED)
            )
            .then_some(())
        })
        .await;
    }
    assert_eq!(agent.overlaps(), 0);
}
