//! Snapshots, sandboxes created from them, and forks.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{Control, ErrorCode, FakeAgent, Options, answer, assert_failure, until};

async fn snapshot(control: &Control, query: &str, body: Value) -> (StatusCode, Value) {
    control.post(&format!("/v1/snapshots{query}"), body).await
}

#[tokio::test]
async fn snapshot_is_created_listed_used_and_deleted() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let body = json!({ "vcpus": 2, "memory_mb": 512, "disk_size_mb": 2048 });
    let (_, made) = control.post("/v1/sandboxes", body).await;
    let id = made["id"].as_str().unwrap();
    let request = control
        .request(Method::POST, "/v1/snapshots")
        .json(&json!({ "sandbox_id": id, "name": "mine" }));
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::CREATED);
    assert_eq!(response.headers()["location"], "/v1/snapshots/mine");
    let template: Value = response.json().await.unwrap();
    assert_eq!(
        (&template["name"], &template["type"]),
        (&json!("mine"), &json!("snapshot"))
    );
    assert_eq!(
        (
            &template["vcpus"],
            &template["memory_mb"],
            &template["disk_size_mb"],
            &template["generation"]
        ),
        (&json!(2), &json!(512), &json!(2048), &json!(1))
    );
    assert_eq!(
        control.status(id).await,
        "running",
        "the sandbox keeps running"
    );
    assert_eq!(control.get("/v1/snapshots/mine").await.1, template);
    let names = async |query: &str| {
        let (_, list) = control.get(&format!("/v1/snapshots{query}")).await;
        let names = list
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t["name"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    assert_eq!(names("").await, ["mine", "minimal"]);
    assert_eq!(names("?type=snapshot").await, ["mine"]);
    assert_eq!(names("?type=base").await, ["minimal"]);
    assert_eq!(
        control
            .get("/v1/templates")
            .await
            .1
            .as_array()
            .unwrap()
            .len(),
        2
    );

    // The sizes are those of the snapshot, whatever the request asks for. The request must still be
    // valid.
    let body = json!({ "template": "mine", "vcpus": 1, "memory_mb": 128, "disk_size_mb": 9999 });
    let (status, spawned) = control.post("/v1/sandboxes", body).await;
    assert_eq!(status, StatusCode::CREATED, "{spawned}");
    assert_eq!(
        (
            &spawned["vcpus"],
            &spawned["memory_mb"],
            &spawned["disk_size_mb"],
            &spawned["template"]
        ),
        (&json!(2), &json!(512), &json!(2048), &json!("mine"))
    );
    let sent = agent.last_create();
    assert_eq!(
        (sent.vcpus, sent.memory_mb, sent.disk_size_mb),
        (2, 512, 2048)
    );
    let got = control
        .post("/v1/sandboxes", json!({ "template": "mine", "vcpus": 0 }))
        .await;
    assert_failure(&got, 400, "invalid_request", &["`vcpus`"]);

    agent.fail(
        "DeleteSnapshot",
        ErrorCode::FailedPrecondition,
        "sandbox sb-1 depends on it",
    );
    let got = control.delete("/v1/snapshots/mine").await;
    assert_failure(&got, 409, "conflict", &["sandbox sb-1 depends on it"]);
    agent.mend("DeleteSnapshot");
    assert_eq!(
        control.delete("/v1/snapshots/mine").await.0,
        StatusCode::NO_CONTENT
    );
    assert_failure(
        &control.delete("/v1/snapshots/mine").await,
        404,
        "not_found",
        &["mine"],
    );
    assert_failure(
        &control.get("/v1/snapshots/mine").await,
        404,
        "not_found",
        &["mine"],
    );
    assert_failure(
        &control.delete("/v1/snapshots/minimal").await,
        409,
        "conflict",
        &["minimal"],
    );
    assert_eq!(agent.template_names(), ["minimal"]);
    let got = control
        .post("/v1/sandboxes", json!({ "template": "mine" }))
        .await;
    assert_failure(&got, 404, "not_found", &["`template`"]);
}

#[tokio::test]
async fn name_is_unique_unless_overwritten() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let body = || json!({ "sandbox_id": id, "name": "mine" });
    assert_eq!(snapshot(&control, "", body()).await.0, StatusCode::CREATED);
    let got = snapshot(&control, "", body()).await;
    assert_failure(&got, 409, "already_exists", &[]);
    let (_, row) = control.get(&format!("/v1/sandboxes/{id}")).await;
    assert_eq!(
        row.get("warning"),
        None,
        "an invalid name reveals nothing about the sandbox"
    );
    assert_eq!(
        snapshot(&control, "?overwrite=true", body()).await.0,
        StatusCode::CREATED
    );
    let got = snapshot(&control, "?overwrite=perhaps", body()).await;
    assert_failure(&got, 400, "invalid_request", &["overwrite"]);
    // An unnamed snapshot of a paused sandbox.
    let (status, _) = control
        .post(&format!("/v1/sandboxes/{id}/pause"), Value::Null)
        .await;
    assert_eq!(status, StatusCode::OK);
    let (status, made) = snapshot(&control, "", json!({ "sandbox_id": id })).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let name = made["name"].as_str().unwrap();
    assert!(wrenn_model::TemplateName::is_random(name), "{name}");
    assert_eq!(
        control.status(&id).await,
        "paused",
        "the sandbox stays paused"
    );
}

#[tokio::test]
async fn failed_snapshot_keeps_the_sandbox_running_with_a_warning() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    agent.fail(
        "CreateSnapshot",
        ErrorCode::ResourceExhausted,
        "the disk is full",
    );
    let body = json!({ "sandbox_id": id, "name": "mine" });
    let got = snapshot(&control, "", body.clone()).await;
    assert_failure(&got, 503, "resource_exhausted", &["the disk is full"]);
    let (_, row) = control.get(&format!("/v1/sandboxes/{id}")).await;
    assert_eq!(row["status"], "running");
    assert!(
        row["warning"]
            .as_str()
            .unwrap()
            .contains("the disk is full"),
        "{row}"
    );
    agent.mend("CreateSnapshot");
    // A lost reply: the template exists and is listed.
    agent.drop_replies("CreateSnapshot", 1);
    let got = snapshot(&control, "", body.clone()).await;
    assert_failure(&got, 503, "unavailable", &[]);
    assert_eq!(control.get("/v1/snapshots/mine").await.0, StatusCode::OK);
    assert_eq!(
        snapshot(&control, "?overwrite=true", body).await.0,
        StatusCode::CREATED
    );
    let (_, row) = control.get(&format!("/v1/sandboxes/{id}")).await;
    assert_eq!(
        (&row["status"], row.get("warning")),
        (&json!("running"), None),
        "{row}"
    );
}

#[tokio::test]
async fn frequent_reconciler_and_a_disconnect_do_not_disturb_a_snapshot() {
    let agent = FakeAgent::start().await;
    let options = Options {
        poll_interval: Duration::from_millis(10),
        ..Options::default()
    };
    let control = Control::start_with(&agent, options).await;
    let id = control.create().await;
    for round in 0..5 {
        agent.state.snapshot_gate.shut();
        let body = json!({ "sandbox_id": id, "name": format!("s{round}") });
        let call = tokio::spawn(
            control
                .request(Method::POST, "/v1/snapshots")
                .json(&body)
                .send(),
        );
        until("the host works on the call", async || {
            (agent.state.snapshot_gate.waiting() == 1).then_some(())
        })
        .await;
        call.abort();
        // Meanwhile, the host lists the sandbox as paused.
        let looks = agent.calls("ListSandboxes");
        until("the reconciler has polled ten times", async || {
            (agent.calls("ListSandboxes") > looks + 10).then_some(())
        })
        .await;
        assert_eq!(control.status(&id).await, "running");
        agent.state.snapshot_gate.open();
        until("the template exists", async || {
            let (status, _) = control.get(&format!("/v1/snapshots/s{round}")).await;
            (status == StatusCode::OK).then_some(())
        })
        .await;
        assert_eq!(control.status(&id).await, "running");
    }
    assert_eq!(agent.calls("DestroySandbox"), 0);
}

#[tokio::test]
async fn templates_of_an_unreachable_host_are_the_last_known_ones() {
    let mut agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let body = json!({ "sandbox_id": id, "name": "mine" });
    let (_, made) = snapshot(&control, "", body).await;
    let (_, before) = control.get("/v1/snapshots").await;
    agent.down().await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(control.get("/v1/snapshots").await.1, before);
    assert_eq!(control.get("/v1/snapshots/mine").await.1, made);
    assert_failure(
        &control.delete("/v1/snapshots/mine").await,
        503,
        "unavailable",
        &[],
    );
}

#[tokio::test]
async fn fork_creates_running_copies_with_the_settings_of_the_source() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let body = json!({
        "vcpus": 2, "memory_mb": 512, "timeout_sec": 77, "on_timeout": "kill", "auto_resume": true,
        "egress": "allow", "metadata": { "a": "b" }
    });
    let (_, source) = control.post("/v1/sandboxes", body).await;
    let id = source["id"].as_str().unwrap();
    let (status, copies) = control
        .post(&format!("/v1/capsules/{id}/fork"), json!({ "count": 3 }))
        .await;
    assert_eq!(status, StatusCode::CREATED, "{copies}");
    let copies = copies.as_array().unwrap();
    assert_eq!(copies.len(), 3);
    for copy in copies {
        assert_eq!(copy["status"], "running");
        assert_ne!(copy["id"], source["id"]);
        for field in [
            "template",
            "vcpus",
            "memory_mb",
            "disk_size_mb",
            "timeout_sec",
            "on_timeout",
            "auto_resume",
            "egress",
            "metadata",
            "host_ip",
        ] {
            assert_eq!(copy[field], source[field], "{field}");
        }
        let path = format!("/v1/sandboxes/{}/exec", copy["id"].as_str().unwrap());
        assert_eq!(
            control.post(&path, json!({ "cmd": "echo" })).await.0,
            StatusCode::OK
        );
    }
    assert_eq!(agent.ids().len(), 4);
    let (_, copies) = control
        .post(&format!("/v1/sandboxes/{id}/fork"), Value::Null)
        .await;
    assert_eq!(copies.as_array().unwrap().len(), 1, "one copy by default");
    let (status, copies) = control
        .post(&format!("/v1/sandboxes/{id}/fork"), json!({ "count": 100 }))
        .await;
    assert_eq!(
        (status, copies.as_array().unwrap().len()),
        (StatusCode::CREATED, 100)
    );
}

#[tokio::test]
async fn a_fork_that_fails_leaves_no_copy_and_no_row() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let path = format!("/v1/sandboxes/{id}/fork");
    let rows = async || {
        control
            .get("/v1/sandboxes?status=all")
            .await
            .1
            .as_array()
            .unwrap()
            .len()
    };
    agent.fail(
        "ForkSandbox",
        ErrorCode::ResourceExhausted,
        "no memory left",
    );
    let got = control.post(&path, json!({ "count": 5 })).await;
    assert_failure(&got, 503, "resource_exhausted", &["no memory left"]);
    assert_eq!(rows().await, 1);
    agent.mend("ForkSandbox");
    // A lost reply: the copies exist on the host and must be destroyed.
    agent.drop_replies("ForkSandbox", 1);
    let got = control.post(&path, json!({ "count": 5 })).await;
    assert_failure(&got, 503, "unavailable", &[]);
    assert_eq!(rows().await, 1);
    until("no copy is left", async || {
        (agent.ids() == [id.as_str()]).then_some(())
    })
    .await;
    assert_eq!(control.status(&id).await, "running");
    let (_, row) = control.get(&format!("/v1/sandboxes/{id}")).await;
    assert!(
        row["warning"].as_str().unwrap().contains("fork failed"),
        "{row}"
    );
    let (status, _) = control.post(&path, Value::Null).await;
    assert_eq!(status, StatusCode::CREATED);
}

#[tokio::test]
async fn copies_in_progress_are_listed_and_can_be_destroyed() {
    let agent = FakeAgent::start().await;
    let options = Options {
        poll_interval: Duration::from_millis(10),
        ..Options::default()
    };
    let control = Control::start_with(&agent, options).await;
    let id = control.create().await;
    agent.state.fork_gate.shut();
    let request = control
        .request(Method::POST, &format!("/v1/sandboxes/{id}/fork"))
        .json(&json!({ "count": 2 }));
    let call = tokio::spawn(answer(request));
    until("the host works on the call", async || {
        (agent.state.fork_gate.waiting() == 1).then_some(())
    })
    .await;
    let (_, list) = control.get("/v1/sandboxes?status=starting").await;
    assert_eq!(list.as_array().unwrap().len(), 2, "{list}");
    let unwanted = list[0]["id"].as_str().unwrap().to_owned();
    let request = control.request(Method::DELETE, &format!("/v1/sandboxes/{unwanted}"));
    let destroy = tokio::spawn(answer(request));
    until("the host receives the call", async || {
        (agent.calls("DestroySandbox") > 0).then_some(())
    })
    .await;
    agent.state.fork_gate.open();
    assert_eq!(destroy.await.unwrap().0, StatusCode::NO_CONTENT);
    let (status, copies) = call.await.unwrap();
    assert_eq!(status, StatusCode::CREATED, "{copies}");
    assert_eq!(control.status(&unwanted).await, "stopped");
    until("two sandboxes are left", async || {
        (agent.ids().len() == 2).then_some(())
    })
    .await;
}

#[tokio::test]
async fn snapshot_is_written_to_and_taken_from_the_object_store() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let pull = async |query: &str| {
        let path = format!("/v1/snapshots/shared/pull{query}");
        control.post(&path, json!({})).await
    };
    let push = async || control.post("/v1/snapshots/shared/push", json!({})).await;
    assert_eq!(push().await.0, StatusCode::NOT_FOUND);
    let (status, pulled) = pull("").await;
    assert_eq!(
        (status, &pulled["name"]),
        (StatusCode::CREATED, &json!("shared"))
    );
    assert_eq!(control.get("/v1/snapshots/shared").await.0, StatusCode::OK);
    assert_failure(&pull("").await, 409, "already_exists", &["taken"]);
    assert_eq!(pull("?overwrite=true").await.0, StatusCode::CREATED);
    assert_eq!(push().await.0, StatusCode::NO_CONTENT);
    let unconfigured = "set WRENN_STORE_URL";
    agent.fail("PushSnapshot", ErrorCode::FailedPrecondition, unconfigured);
    assert_failure(&push().await, 409, "invalid_state", &[unconfigured]);
    agent.fail("PullSnapshot", ErrorCode::Unavailable, "no answer");
    let (status, answer) = pull("?overwrite=true").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
    let (status, _) = control.post("/v1/snapshots/No Name/pull", json!({})).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}
