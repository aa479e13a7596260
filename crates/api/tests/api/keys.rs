//! API keys: responses without a valid key, and the life of a key.

use reqwest::StatusCode;
use serde_json::json;

use crate::support::{Control, FakeAgent, Socket, answer, assert_failure};

#[tokio::test]
async fn request_without_a_valid_key_is_rejected() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let client = reqwest::Client::new();
    let wrong = format!("wrn_{}", "0".repeat(32));
    for key in [
        None,
        Some(""),
        Some("x"),
        Some(wrong.as_str()),
        Some("wrn_"),
    ] {
        for path in [
            "/v1/sandboxes",
            "/openapi.yaml",
            "/v1/nonesuch",
            "/v1/snapshots",
            "/health/",
        ] {
            let mut request = client.get(control.url(path));
            if let Some(key) = key {
                request = request.header("X-API-Key", key);
            }
            assert_failure(&answer(request).await, 401, "unauthorized", &["X-API-Key"]);
        }
        for route in ["exec/stream", "pty"] {
            let path = format!("/v1/sandboxes/{id}/{route}");
            let got = Socket::try_open(&control, &path, key).await.err().unwrap();
            assert_failure(&got, 401, "unauthorized", &["X-API-Key"]);
        }
        // An upgrade header on an ordinary route does not bypass the check.
        let request = client
            .get(control.url("/v1/sandboxes"))
            .header("Upgrade", "websocket")
            .header("Connection", "Upgrade");
        assert_failure(&answer(request).await, 401, "unauthorized", &[]);
    }
    let got = control.get(&format!("/v1/sandboxes/{id}/pty")).await;
    assert_failure(&got, 400, "invalid_request", &["WebSocket"]);
}

#[tokio::test]
async fn keys_are_created_listed_and_deleted_except_the_last() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let (status, made) = control.post("/v1/api-keys", json!({ "name": "ci" })).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let secret = made["key"].as_str().unwrap().to_owned();
    let (_, keys) = control.get("/v1/api-keys").await;
    // The first keys, one per form, and the new one.
    assert_eq!(keys.as_array().unwrap().len(), 3);
    assert!(!keys.to_string().contains(&secret));
    let with = |key: &str| {
        let request = reqwest::Client::new().get(control.url("/v1/sandboxes"));
        answer(request.header("X-API-Key", key))
    };
    assert_eq!(with(&secret).await.0, StatusCode::OK);
    let id = made["api_key"]["id"].as_str().unwrap();
    let (status, _) = control.delete(&format!("/v1/api-keys/{id}")).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert_failure(&with(&secret).await, 401, "unauthorized", &[]);
    assert_failure(
        &control.delete(&format!("/v1/api-keys/{id}")).await,
        404,
        "not_found",
        &[],
    );
    let (_, keys) = control.get("/v1/api-keys").await;
    let id_of = |form: &str| {
        let mut keys = keys.as_array().unwrap().iter();
        let key = keys.find(|key| key["prefix"].as_str().unwrap().starts_with(form));
        key.unwrap()["id"].as_str().unwrap().to_owned()
    };
    let path = format!("/v1/api-keys/{}", id_of("e2b_"));
    assert_eq!(control.delete(&path).await.0, StatusCode::NO_CONTENT);
    let path = format!("/v1/api-keys/{}", id_of("wrn_"));
    assert_failure(&control.delete(&path).await, 409, "conflict", &["last"]);
}
