//! Invalid input is rejected with an error that names the field, and changes nothing. No VM is
//! booted here.

use anyhow::Result;
use reqwest::{Method, StatusCode};
use serde_json::json;
use wrenn_e2e::{Service, host::Traces};

#[tokio::test]
async fn create_with_an_invalid_field_is_rejected_with_its_name() -> Result<()> {
    let service = Service::start().await?;
    let before = Traces::of(service.dir())?.sandbox_dirs;
    let cases = [
        (json!({ "template": "nonesuch" }), 404, "nonesuch"),
        (json!({ "template": "../minimal" }), 400, "template"),
        (json!({ "vcpus": 0 }), 400, "vcpus"),
        (json!({ "vcpus": 10_000 }), 400, "vcpus"),
        (json!({ "vcpus": "two" }), 400, "vcpus"),
        (json!({ "memory_mb": 1 }), 400, "memory_mb"),
        (json!({ "memory_mb": 100_000_000 }), 400, "memory_mb"),
        (json!({ "memory_mb": -5 }), 400, "memory_mb"),
        (json!({ "timeout_sec": -1 }), 400, "timeout_sec"),
        (json!({ "disk_size_mb": 1 }), 400, "disk_size_mb"),
        (json!({ "egress": "maybe" }), 400, "egress"),
        (json!({ "envs": { "A=B": "x" } }), 400, "envs"),
        (json!({ "memroy_mb": 512 }), 400, "memroy_mb"),
        (json!([]), 400, ""),
    ];
    for (body, status, word) in cases {
        let (got, reply) = service.json(Method::POST, "/v1/sandboxes", &body).await?;
        assert_eq!(got.as_u16(), status, "{body}: {reply}");
        let message = reply["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains(word), "{body}: {reply}");
    }
    let request = service
        .request(Method::POST, "/v1/sandboxes")
        .header("content-type", "application/json");
    let reply = request.body("{\"vcpus\":").send().await?;
    assert_eq!(reply.status(), StatusCode::BAD_REQUEST);
    let request = service
        .request(Method::POST, "/v1/sandboxes")
        .header("content-type", "application/json");
    let large = format!("{{\"template\":\"{}\"}}", "a".repeat(4 << 20));
    let reply = request.body(large).send().await?;
    assert_eq!(reply.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let (_, list) = service.get("/v1/sandboxes?status=all").await?;
    assert_eq!(list, json!([]));
    assert_eq!(Traces::of(service.dir())?.sandbox_dirs, before);
    Ok(())
}

#[tokio::test]
async fn only_health_needs_no_key() -> Result<()> {
    let service = Service::start().await?;
    let client = reqwest::Client::new();
    let paths = [
        "/v1/sandboxes",
        "/v1/capsules",
        "/v1/sandboxes/sb-00000000",
        "/openapi.yaml",
        "/v1/sandboxes/sb-00000000/exec/stream",
    ];
    for path in paths {
        for key in [None, Some(""), Some("wrn_00000000000000000000000000000000")] {
            let mut request = client
                .get(service.url(path))
                .header("Upgrade", "websocket")
                .header("Connection", "Upgrade");
            if let Some(key) = key {
                request = request.header("X-API-Key", key);
            }
            let response = request.send().await?;
            assert_eq!(
                response.status(),
                StatusCode::UNAUTHORIZED,
                "{path} {key:?}"
            );
            let body: serde_json::Value = response.json().await?;
            assert_eq!(body["error"]["code"], "unauthorized");
        }
    }
    assert!(
        client
            .get(service.url("/health"))
            .send()
            .await?
            .status()
            .is_success()
    );
    Ok(())
}

#[tokio::test]
async fn unknown_sandbox_is_not_found_on_every_route() -> Result<()> {
    let service = Service::start().await?;
    let calls = [
        (Method::GET, "", json!(null)),
        (Method::DELETE, "", json!(null)),
        (Method::POST, "/exec", json!({ "cmd": "true" })),
        (Method::GET, "/processes", json!(null)),
        (Method::POST, "/files/read", json!({ "path": "/x" })),
        (Method::POST, "/files/list", json!({ "path": "/x" })),
        (Method::POST, "/ping", json!({})),
        (Method::GET, "/metrics", json!(null)),
    ];
    for (method, rest, body) in calls {
        for id in ["sb-00000000", "..%2f..%2fetc", "nonsense"] {
            let path = format!("/v1/sandboxes/{id}{rest}");
            let (status, reply) = service.json(method.clone(), &path, &body).await?;
            assert!(
                matches!(status.as_u16(), 404 | 400),
                "{method} {path}: {status} {reply}"
            );
            assert!(
                reply["error"]["message"].is_string(),
                "{method} {path}: {reply}"
            );
        }
    }
    Ok(())
}
