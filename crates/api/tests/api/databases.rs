//! Life of sandboxes and keys on each database, across a restart of the control plane.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{Control, Databases, FakeAgent, NOT_STOPPED, answer, assert_failure};

on_both!(
    a_sandbox_lives_through_pause_restart_and_resume,
    keys_are_created_used_and_deleted,
    a_repeated_create_returns_the_first_sandbox,
);

async fn ids(control: &Control, path: &str) -> Vec<String> {
    let (status, list) = control.get(path).await;
    assert_eq!(status, StatusCode::OK, "{list}");
    let list = list.as_array().unwrap().iter();
    let ids = list.map(|row| row["id"].as_str().unwrap().to_owned());
    ids.collect()
}

async fn a_sandbox_lives_through_pause_restart_and_resume(databases: Databases) {
    let agent = FakeAgent::start().await;
    let control = Control::start_with(&agent, databases.options("db")).await;
    let asked = json!({ "auto_resume": false, "metadata": { "a \"b\"": "Grüße" } });
    let (status, made) = control.post("/v1/sandboxes", asked).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let id = made["id"].as_str().unwrap();
    let path = format!("/v1/sandboxes/{id}");
    let other = control.create().await;
    let listed = ids(&control, NOT_STOPPED).await;
    assert_eq!(listed.len(), 2);
    assert!(listed.iter().any(|listed| listed == id) && listed.contains(&other));

    let (status, paused) = control.post(&format!("{path}/pause"), Value::Null).await;
    assert_eq!(
        (status, &paused["status"]),
        (StatusCode::OK, &json!("paused"))
    );
    control.stop().await;

    let control = Control::start_with(&agent, databases.options("db")).await;
    let (_, row) = control.get(&path).await;
    assert_eq!(row["status"], "paused");
    for field in [
        "metadata",
        "boot",
        "cpu",
        "created_at",
        "started_at",
        "auto_resume",
    ] {
        assert_eq!(row[field], made[field], "{field}");
    }
    assert_eq!(ids(&control, "/v1/sandboxes?status=paused").await, [id]);
    let (status, resumed) = control.post(&format!("{path}/resume"), Value::Null).await;
    assert_eq!(
        (status, &resumed["status"]),
        (StatusCode::OK, &json!("running"))
    );
    // The E2B API lists by first start, in pages.
    let (status, page) = control.get("/v2/sandboxes?limit=1").await;
    assert_eq!(
        (status, page.as_array().unwrap().len()),
        (StatusCode::OK, 1)
    );

    assert_eq!(control.delete(&path).await.0, StatusCode::NO_CONTENT);
    assert_eq!(ids(&control, NOT_STOPPED).await, [other]);
    let (status, health) = control.get("/health").await;
    assert_eq!(status, StatusCode::OK, "{health}");
}

async fn keys_are_created_used_and_deleted(databases: Databases) {
    let agent = FakeAgent::start().await;
    let control = Control::start_with(&agent, databases.options("db")).await;
    let (status, made) = control.post("/v1/api-keys", json!({ "name": "ci" })).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let with = || {
        let request = reqwest::Client::new().get(control.url("/v1/sandboxes"));
        answer(request.header("X-API-Key", made["key"].as_str().unwrap()))
    };
    assert_eq!(with().await.0, StatusCode::OK);
    let (_, keys) = control.get("/v1/api-keys").await;
    let listed = keys
        .as_array()
        .unwrap()
        .iter()
        .find(|key| key["name"] == "ci");
    assert!(listed.unwrap()["last_used_at"].is_string(), "{keys}");
    let path = format!("/v1/api-keys/{}", made["api_key"]["id"].as_str().unwrap());
    assert_eq!(control.delete(&path).await.0, StatusCode::NO_CONTENT);
    assert_failure(&with().await, 401, "unauthorized", &[]);
}

async fn a_repeated_create_returns_the_first_sandbox(databases: Databases) {
    let agent = FakeAgent::start().await;
    let control = Control::start_with(&agent, databases.options("db")).await;
    let create = || {
        let request = control.request(Method::POST, "/v2/sandboxes");
        let request = request.header("Idempotency-Key", "the-same");
        answer(request.json(&json!({ "templateID": "minimal" })))
    };
    let ((_, first), (_, second)) = tokio::join!(create(), create());
    let (_, third) = create().await;
    assert!(first["sandboxID"].is_string(), "{first}");
    for again in [second, third] {
        assert_eq!(again["sandboxID"], first["sandboxID"], "{again}");
    }
    assert_eq!(agent.ids().len(), 1);
}
