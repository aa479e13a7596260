//! Teams and scopes: a key reaches the sandboxes of its own team, and the routes of its scopes.

use reqwest::StatusCode;
use serde_json::{Value, json};
use wrenn_control::api_key::{Auth, KeyForm};
use wrenn_db::Db;
use wrenn_model::Scopes;

use crate::support::{Control, Databases, FakeAgent, answer, assert_failure};

on_both!(
    a_team_neither_sees_nor_changes_the_sandboxes_of_another,
    two_teams_may_use_the_same_idempotency_key,
);

/// Adds a key of a second team to the database of a control plane.
async fn key_of_other_team(url: &str, form: KeyForm) -> String {
    let db = Db::open(url).await.unwrap();
    let team = "other".parse().unwrap();
    let auth = Auth::new(db.clone());
    let made = auth.make(&team, "test", form, Scopes::all()).await;
    let secret = made.unwrap().secret;
    db.close().await;
    secret
}

async fn a_team_neither_sees_nor_changes_the_sandboxes_of_another(databases: Databases) {
    let agent = FakeAgent::start().await;
    let options = databases.options("db");
    let url = options.database_url.clone().unwrap();
    let control = Control::start_with(&agent, options).await;
    let id = control.create().await;
    let key = key_of_other_team(&url, KeyForm::Wrenn).await;
    let client = reqwest::Client::new();
    let call = |method: &str, path: &str, body: Value| {
        let request = client.request(method.parse().unwrap(), control.url(path));
        answer(request.header("X-API-Key", &key).json(&body))
    };
    for (method, path, body) in [
        ("GET", "", Value::Null),
        ("DELETE", "", Value::Null),
        ("POST", "/ping", json!({})),
        ("POST", "/pause", json!({})),
        ("POST", "/resume", json!({})),
        ("POST", "/fork", json!({ "count": 1 })),
        ("POST", "/exec", json!({ "cmd": "true" })),
        ("POST", "/files/list", json!({ "path": "/" })),
        ("GET", "/processes", Value::Null),
        ("GET", "/metrics", Value::Null),
    ] {
        let got = call(method, &format!("/v1/sandboxes/{id}{path}"), body).await;
        assert_failure(&got, 404, "not_found", &[&id]);
    }
    let snapshot = json!({ "sandbox_id": id });
    let got = call("POST", "/v1/snapshots", snapshot).await;
    assert_failure(&got, 404, "not_found", &[&id]);
    for (method, path, body) in [
        ("GET", "", Value::Null),
        ("DELETE", "", Value::Null),
        ("POST", "/pause", json!({})),
        ("POST", "/connect", json!({ "timeout": 10 })),
        ("POST", "/timeout", json!({ "timeout": 10 })),
        ("POST", "/snapshots", json!({})),
        ("PUT", "/network", json!({})),
        ("GET", "/metrics", Value::Null),
    ] {
        let (status, body) = call(method, &format!("/sandboxes/{id}{path}"), body).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{method} {path}: {body}");
    }
    for path in ["/v1/sandboxes?status=all", "/v2/sandboxes"] {
        let (status, list) = call("GET", path, Value::Null).await;
        assert_eq!((status, list), (StatusCode::OK, json!([])), "{path}");
    }
    let (_, keys) = call("GET", "/v1/api-keys", Value::Null).await;
    assert_eq!(keys.as_array().unwrap().len(), 1);
    assert_eq!(control.status(&id).await, "running");

    // What the team creates belongs to it alone.
    let (status, made) = call("POST", "/v1/sandboxes", json!({})).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let own = made["id"].as_str().unwrap();
    let (_, list) = call("GET", "/v1/sandboxes", Value::Null).await;
    assert_eq!(list[0]["id"], own);
    let got = control.get(&format!("/v1/sandboxes/{own}")).await;
    assert_failure(&got, 404, "not_found", &[own]);
}

async fn two_teams_may_use_the_same_idempotency_key(databases: Databases) {
    let agent = FakeAgent::start().await;
    let options = databases.options("db");
    let url = options.database_url.clone().unwrap();
    let control = Control::start_with(&agent, options).await;
    let other = key_of_other_team(&url, KeyForm::E2b).await;
    let client = reqwest::Client::new();
    let mut ids = Vec::new();
    for key in [control.e2b_key(), other.clone(), control.e2b_key(), other] {
        let request = client
            .post(control.url("/sandboxes"))
            .header("X-API-Key", key)
            .header("Idempotency-Key", "7")
            .json(&json!({ "templateID": "minimal" }));
        let (status, made) = answer(request).await;
        assert_eq!(status, StatusCode::CREATED, "{made}");
        ids.push(made["sandboxID"].as_str().unwrap().to_owned());
    }
    assert_eq!(ids[..2], ids[2..]);
    assert_ne!(ids[0], ids[1]);
}

#[tokio::test]
async fn a_key_reaches_the_routes_of_its_scopes_only() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let make =
        |scopes: Value| control.post("/v1/api-keys", json!({ "name": "x", "scopes": scopes }));
    for (bad, word) in [(json!([]), "at least one"), (json!(["root"]), "root")] {
        assert_failure(&make(bad).await, 400, "invalid_request", &["scopes", word]);
    }
    let client = reqwest::Client::new();
    let routes = [
        ("sandboxes", "/v1/sandboxes"),
        ("sandboxes", "/v2/sandboxes"),
        ("sandboxes", "/v1/templates"),
        ("keys", "/v1/api-keys"),
        ("hosts", "/v1/host"),
        ("hosts", "/v1/unknown-sandboxes"),
    ];
    for scope in ["sandboxes", "keys", "hosts"] {
        let (status, made) = make(json!([scope])).await;
        assert_eq!(status, StatusCode::CREATED, "{made}");
        assert_eq!(made["api_key"]["scopes"], json!([scope]));
        let key = made["key"].as_str().unwrap();
        for (needed, path) in routes {
            let request = client.get(control.url(path)).header("X-API-Key", key);
            let (status, body) = answer(request).await;
            if needed == scope {
                assert_eq!(status, StatusCode::OK, "{path}: {body}");
            } else {
                assert_eq!(status, StatusCode::FORBIDDEN, "{path}: {body}");
                assert!(body.to_string().contains(needed), "{path}: {body}");
            }
        }
    }
    let (_, made) = make(json!(["keys"])).await;
    let request = client
        .post(control.url("/v1/api-keys"))
        .header("X-API-Key", made["key"].as_str().unwrap());
    let wider = request.json(&json!({ "name": "y", "scopes": ["sandboxes"] }));
    assert_failure(&answer(wider).await, 400, "invalid_request", &["scopes"]);
}
