//! Wrong databases and several hosts: a sandbox that is not in the database is never destroyed.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{Control, Databases, FakeAgent, assert_failure, until};

on_both!(
    an_empty_or_mistyped_database_destroys_nothing_and_lists_unknown_sandboxes,
    an_unknown_sandbox_is_adopted_or_destroyed_by_command_only,
    rows_of_another_host_are_left_alone,
    a_sandbox_that_is_absent_once_is_not_lost,
);

/// Waits for enough passes of the reconciler that any step would have been taken.
async fn looks(agent: &FakeAgent) {
    let before = agent.calls("ListSandboxes");
    until("the reconciler has looked ten times", async || {
        (agent.calls("ListSandboxes") > before + 10).then_some(())
    })
    .await;
}

async fn unknown(control: &Control) -> Vec<String> {
    let (status, list) = control.get("/v1/unknown-sandboxes").await;
    assert_eq!(status, StatusCode::OK, "{list}");
    let list = list.as_array().unwrap().iter();
    list.map(|sandbox| sandbox["id"].as_str().unwrap().to_owned())
        .collect()
}

async fn an_empty_or_mistyped_database_destroys_nothing_and_lists_unknown_sandboxes(
    databases: Databases,
) {
    let agent = FakeAgent::start().await;
    let right = Control::start_with(&agent, databases.options("right")).await;
    let (running, paused) = (right.create().await, right.create().await);
    let path = format!("/v1/sandboxes/{paused}/pause");
    assert_eq!(right.post(&path, Value::Null).await.0, StatusCode::OK);
    right.stop().await;

    let wrong = Control::start_with(&agent, databases.options("wrong")).await;
    looks(&agent).await;
    assert_eq!(agent.calls("DestroySandbox"), 0);
    let mut all = vec![running.clone(), paused.clone()];
    all.sort();
    assert_eq!(unknown(&wrong).await, all);
    // The sandbox is not in this database, so no other call accepts it.
    let got = wrong.delete(&format!("/v1/sandboxes/{running}")).await;
    assert_eq!(got.0, StatusCode::NOT_FOUND);
    // A control plane with the wrong database can create sandboxes of its own.
    let own = wrong.create().await;
    assert_eq!(unknown(&wrong).await, all);
    wrong.stop().await;

    let right = Control::start_with(&agent, databases.options("right")).await;
    looks(&agent).await;
    assert_eq!(right.status(&running).await, "running");
    assert_eq!(right.status(&paused).await, "paused");
    assert_eq!(unknown(&right).await, [own]);
    assert_eq!(agent.calls("DestroySandbox"), 0);
}

#[tokio::test]
async fn a_database_restored_from_an_older_copy_keeps_what_was_created_since() {
    let agent = FakeAgent::start().await;
    let databases = Databases::sqlite();
    let dir = databases.dir.path();
    let control = Control::start_with(&agent, databases.options("db")).await;
    let old = control.create().await;
    control.stop().await;
    std::fs::copy(dir.join("db"), dir.join("backup")).unwrap();
    let control = Control::start_with(&agent, databases.options("db")).await;
    let new = control.create().await;
    let destroyed = old.clone();
    let path = format!("/v1/sandboxes/{destroyed}");
    assert_eq!(control.delete(&path).await.0, StatusCode::NO_CONTENT);
    control.stop().await;

    let restored = Control::start_with(&agent, databases.options("backup")).await;
    // To this copy of the database, a sandbox that was destroyed since appears as lost.
    restored.until_status(&old, "error").await;
    assert_eq!(agent.ids(), std::slice::from_ref(&new));
    assert_eq!(unknown(&restored).await, [new]);
}

async fn an_unknown_sandbox_is_adopted_or_destroyed_by_command_only(databases: Databases) {
    let agent = FakeAgent::start().await;
    let first = Control::start_with(&agent, databases.options("first")).await;
    let (kept, ended) = (first.create().await, first.create().await);
    first.stop().await;

    let second = Control::start_with(&agent, databases.options("second")).await;
    let path = |id: &str, verb: &str| format!("/v1/unknown-sandboxes/{id}{verb}");
    let (status, row) = second.post(&path(&kept, "/adopt"), Value::Null).await;
    assert_eq!(status, StatusCode::OK, "{row}");
    assert_eq!(
        (&row["status"], &row["template"]),
        (&json!("running"), &json!("minimal"))
    );
    let exec = format!("/v1/sandboxes/{kept}/exec");
    let (status, _) = second.post(&exec, json!({ "cmd": "echo" })).await;
    assert_eq!(status, StatusCode::OK);
    assert_failure(
        &second.post(&path(&kept, "/adopt"), Value::Null).await,
        409,
        "conflict",
        &["is in the database"],
    );
    assert_failure(&second.delete(&path(&kept, "")).await, 409, "conflict", &[]);

    let (status, _) = second.delete(&path(&ended, "")).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert_eq!(agent.ids(), [kept]);
    assert_failure(
        &second.delete(&path(&ended, "")).await,
        404,
        "not_found",
        &[],
    );
    assert!(unknown(&second).await.is_empty());
}

/// A control plane with the wrong data directory, or two hosts on one database.
async fn rows_of_another_host_are_left_alone(databases: Databases) {
    let (agent, other) = (FakeAgent::start().await, FakeAgent::start().await);
    "other-host".clone_into(&mut other.state.host_id.lock().unwrap());
    let control = Control::start_with(&agent, databases.options("db")).await;
    let id = control.create().await;
    let (_, timed) = control
        .post(
            "/v1/sandboxes",
            json!({ "timeout_sec": 1, "on_timeout": "kill" }),
        )
        .await;
    let timed = timed["id"].as_str().unwrap().to_owned();
    // Both hosts use the same database at the same time.
    let second = Control::start_with(&other, databases.options("db")).await;
    let own = second.create().await;
    looks(&other).await;
    looks(&agent).await;
    assert_eq!(second.status(&id).await, "running");
    assert_eq!(control.status(&own).await, "running");
    assert!(unknown(&second).await.is_empty() && unknown(&control).await.is_empty());
    let path = format!("/v1/sandboxes/{id}");
    for got in [
        second
            .post(&format!("{path}/exec"), json!({ "cmd": "echo" }))
            .await,
        second.post(&format!("{path}/pause"), Value::Null).await,
        second.delete(&path).await,
    ] {
        assert_failure(
            &got,
            503,
            "unavailable",
            &["other-host", "host-of-the-tests"],
        );
    }
    assert_eq!(second.status(&id).await, "running");
    // The idle sandbox, and no other, is ended by its own host.
    control.until_status(&timed, "stopped").await;
    assert_eq!(other.calls("DestroySandbox"), 0);
    // The templates of one host do not replace those of the other.
    assert_eq!(
        control
            .get("/v1/templates")
            .await
            .1
            .as_array()
            .unwrap()
            .len(),
        1
    );
}

async fn a_sandbox_that_is_absent_once_is_not_lost(databases: Databases) {
    let agent = FakeAgent::start().await;
    let control = Control::start_with(&agent, databases.options("db")).await;
    let id = control.create().await;
    agent.state.list_gate.shut();
    until("the reconciler waits", async || {
        (agent.state.list_gate.waiting() > 0).then_some(())
    })
    .await;
    let hidden = agent.hide(&id);
    agent.state.list_gate.admit_one();
    until("the next look waits", async || {
        (agent.state.list_gate.waiting() > 0).then_some(())
    })
    .await;
    agent.show(&id, hidden);
    agent.state.list_gate.open();
    looks(&agent).await;
    assert_eq!(control.status(&id).await, "running");
    agent.lose(&id);
    control.until_status(&id, "error").await;
}

#[tokio::test]
async fn host_names_templates_that_boot_with_every_create() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let (status, host) = control.get("/v1/host").await;
    assert_eq!(status, StatusCode::OK, "{host}");
    assert_eq!(host["cold_templates"], json!([]));
    agent.boot_minimal("it has no template snapshot for tcg");
    let (_, host) = control.get("/v1/host").await;
    assert_eq!(
        host["cold_templates"],
        json!([{ "name": "minimal", "reason": "it has no template snapshot for tcg" }])
    );
}

#[tokio::test]
async fn logs_of_a_sandbox_are_returned_as_text() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    for (query, source) in [
        ("", "SUPERVISOR"),
        ("?source=supervisor", "SUPERVISOR"),
        ("?source=console", "CONSOLE"),
    ] {
        let path = format!("/v1/host/sandboxes/{id}/log{query}");
        let response = control.request(Method::GET, &path).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let kind = response.headers()["content-type"].to_str().unwrap();
        assert!(kind.starts_with("text/plain"), "{kind}");
        let text = response.text().await.unwrap();
        assert!(
            text.contains(source) && text.ends_with(&format!("{id}\n")),
            "{text}"
        );
    }
    let got = control.get("/v1/host/sandboxes/sb-00000000/log").await;
    assert_failure(&got, 404, "not_found", &["sb-00000000"]);
    let got = control
        .get(&format!("/v1/host/sandboxes/{id}/log?source=x"))
        .await;
    assert_failure(&got, 400, "invalid_request", &["source"]);
}
