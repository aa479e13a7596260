//! The ordinary life of a sandbox.

use reqwest::{Method, StatusCode, multipart};
use serde_json::json;

use crate::support::{Control, FakeAgent, answer};

#[tokio::test]
async fn a_sandbox_is_created_used_listed_and_destroyed() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let body = json!({ "memory_mb": 512, "vcpus": 2, "timeout_sec": 60, "metadata": { "a": "ü" } });
    let (status, made) = control.post("/v1/sandboxes", body).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let id = made["id"].as_str().unwrap();
    assert_eq!(agent.ids(), [id]);
    assert_eq!(made["status"], "running");
    assert_eq!(made["template"], "minimal");
    assert_eq!(
        (&made["vcpus"], &made["memory_mb"]),
        (&json!(2), &json!(512))
    );
    assert_eq!(
        (&made["disk_size_mb"], &made["timeout_sec"]),
        (&json!(5120), &json!(60))
    );
    assert_eq!(made["egress"], "deny");
    assert_eq!(made["host_ip"], "10.11.0.1");
    assert_eq!(made["guest_ip"], "169.254.0.21");
    assert_eq!(made["metadata"], json!({ "a": "ü" }));
    assert_eq!(made["boot"]["envd_ms"], 5);
    assert_eq!(made["cpu"], "max,-avx");
    for time in ["created_at", "started_at", "last_active_at", "last_updated"] {
        assert!(
            made[time]
                .as_str()
                .unwrap()
                .parse::<jiff::Timestamp>()
                .is_ok(),
            "{made}"
        );
    }

    let path = format!("/v1/sandboxes/{id}");
    for prefix in ["sandboxes", "capsules"] {
        let (status, got) = control.get(&format!("/v1/{prefix}/{id}")).await;
        assert_eq!((status, &got["id"]), (StatusCode::OK, &json!(id)));
        let (_, list) = control.get(&format!("/v1/{prefix}")).await;
        assert_eq!(list.as_array().unwrap().len(), 1, "{list}");
    }

    let (status, done) = control
        .post(
            &format!("{path}/exec"),
            json!({ "cmd": "echo", "args": ["a", "b"] }),
        )
        .await;
    assert_eq!(status, StatusCode::OK, "{done}");
    assert_eq!(done["stdout"], "a b\n");
    assert_eq!(
        (&done["exit_code"], &done["encoding"]),
        (&json!(0), &json!("utf-8"))
    );
    assert_eq!(
        (&done["sandbox_id"], &done["cmd"]),
        (&json!(id), &json!("echo"))
    );
    assert!(
        done["duration_ms"].is_u64() && done.get("error").is_none(),
        "{done}"
    );

    let (status, body) = control.delete(&path).await;
    assert_eq!(status, StatusCode::NO_CONTENT, "{body}");
    assert!(agent.ids().is_empty());
    let (_, got) = control.get(&path).await;
    assert_eq!(got["status"], "stopped");
    assert!(got.get("error").is_none(), "{got}");
    let (status, _) = control.delete(&path).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let (_, list) = control.get("/v1/sandboxes").await;
    assert_eq!(list, json!([]));
    let (_, list) = control.get("/v1/sandboxes?status=stopped").await;
    assert_eq!(list[0]["id"], id);
    let (_, list) = control.get("/v1/sandboxes?status=all&limit=1").await;
    assert_eq!(list[0]["id"], id);
}

#[tokio::test]
async fn file_is_uploaded_and_downloaded() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let content: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    let form = multipart::Form::new().text("path", agent.path("d/f")).part(
        "file",
        multipart::Part::bytes(content.clone()).file_name("f"),
    );
    let request = control
        .request(Method::POST, &format!("/v1/sandboxes/{id}/files/write"))
        .multipart(form);
    let (status, body) = answer(request).await;
    assert_eq!(status, StatusCode::NO_CONTENT, "{body}");

    let request = control
        .request(Method::POST, &format!("/v1/sandboxes/{id}/files/read"))
        .json(&json!({ "path": agent.path("d/f") }));
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.content_length(), Some(content.len() as u64));
    assert_eq!(
        response.headers()["content-type"],
        "application/octet-stream"
    );
    assert!(response.bytes().await.unwrap() == content);

    let (_, list) = control
        .post(
            &format!("/v1/sandboxes/{id}/files/list"),
            json!({ "path": agent.path("d") }),
        )
        .await;
    let modified_at = list["entries"][0]["modified_at"].clone();
    // Seconds since 1970, as clients of the contract expect.
    let age = jiff::Timestamp::now().as_second() - modified_at.as_i64().unwrap();
    assert!((0..60).contains(&age), "{age}");
    assert_eq!(
        list["entries"],
        json!([{
            "name": "f", "path": agent.path("d/f"), "type": "file", "size": 800_000, "mode": 0o644,
            "permissions": "-rw-r--r--", "owner": "root", "group": "root", "modified_at": modified_at
        }])
    );
}

#[tokio::test]
async fn the_record_of_an_emulated_sandbox_says_that_it_is_no_security_boundary() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let (_, made) = control.post("/v1/sandboxes", json!({})).await;
    let path = format!("/v1/sandboxes/{}", made["id"].as_str().unwrap());
    let (_, host) = control.get("/v1/host").await;
    for body in [control.get(&path).await.1, host] {
        let isolation = &body["isolation"];
        assert_eq!(isolation["accel"], "tcg", "{body}");
        assert_eq!(isolation["security_boundary"], false, "{body}");
        let note = isolation["note"].as_str().unwrap();
        assert!(note.contains("not a security boundary"), "{note}");
    }
}

#[tokio::test]
async fn only_health_needs_no_key() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let response = reqwest::get(control.url("/health")).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let body: serde_json::Value = response.json().await.unwrap();
    assert_eq!(body["status"], "ok");
    // The fake agent reports software emulation.
    let isolation = &body["isolation"];
    assert_eq!(isolation["security_boundary"], false, "{body}");
    let note = isolation["note"].as_str().unwrap();
    assert!(note.contains("not a security boundary"), "{note}");
    let response = reqwest::get(control.url("/v1/sandboxes")).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
}
