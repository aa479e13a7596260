//! Invalid requests: the error names the field, and nothing is started.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{Control, FakeAgent, Socket, answer, assert_failure};

#[tokio::test]
async fn invalid_create_names_the_field() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let long = "x".repeat(200_000);
    let cases = [
        (
            json!({ "template": "nonesuch" }),
            404,
            "not_found",
            "`template`",
        ),
        (
            json!({ "template": "../etc" }),
            400,
            "invalid_request",
            "`template`",
        ),
        (
            json!({ "template": "" }),
            400,
            "invalid_request",
            "`template`",
        ),
        (
            json!({ "template": "a".repeat(65) }),
            400,
            "invalid_request",
            "`template`",
        ),
        (
            json!({ "template": 7 }),
            400,
            "invalid_request",
            "`template`",
        ),
        (json!({ "vcpus": 0 }), 400, "invalid_request", "`vcpus`"),
        (json!({ "vcpus": -1 }), 400, "invalid_request", "`vcpus`"),
        (
            json!({ "vcpus": 10_000 }),
            400,
            "invalid_request",
            "`vcpus`",
        ),
        // The host has two processors, so the maximum is eight virtual CPUs.
        (json!({ "vcpus": 9 }), 400, "invalid_request", "`vcpus`"),
        (json!({ "vcpus": 1.5 }), 400, "invalid_request", "`vcpus`"),
        (json!({ "vcpus": "1" }), 400, "invalid_request", "`vcpus`"),
        (
            json!({ "memory_mb": 127 }),
            400,
            "invalid_request",
            "`memory_mb`",
        ),
        (
            json!({ "memory_mb": 8193 }),
            400,
            "invalid_request",
            "`memory_mb`",
        ),
        (
            json!({ "memory_mb": i64::MAX }),
            400,
            "invalid_request",
            "`memory_mb`",
        ),
        (
            json!({ "disk_size_mb": 1 }),
            400,
            "invalid_request",
            "`disk_size_mb`",
        ),
        (
            json!({ "disk_size_mb": 1 << 21 }),
            400,
            "invalid_request",
            "`disk_size_mb`",
        ),
        (
            json!({ "timeout_sec": -1 }),
            400,
            "invalid_request",
            "`timeout_sec`",
        ),
        (
            json!({ "timeout_sec": 1_i64 << 40 }),
            400,
            "invalid_request",
            "`timeout_sec`",
        ),
        (
            json!({ "on_timeout": "sleep" }),
            400,
            "invalid_request",
            "`on_timeout`",
        ),
        (
            json!({ "auto_resume": "yes" }),
            400,
            "invalid_request",
            "`auto_resume`",
        ),
        (
            json!({ "egress": "maybe" }),
            400,
            "invalid_request",
            "`egress`",
        ),
        (
            json!({ "envs": { "A=B": "1" } }),
            400,
            "invalid_request",
            "`envs`",
        ),
        (
            json!({ "envs": { "": "1" } }),
            400,
            "invalid_request",
            "`envs`",
        ),
        (
            json!({ "envs": { "A": "\0" } }),
            400,
            "invalid_request",
            "`envs`",
        ),
        (
            json!({ "envs": { "A": long } }),
            400,
            "invalid_request",
            "`envs`",
        ),
        (
            json!({ "envs": { "A": 1 } }),
            400,
            "invalid_request",
            "envs",
        ),
        (
            json!({ "metadata": { "": "1" } }),
            400,
            "invalid_request",
            "`metadata`",
        ),
        (
            json!({ "metadata": { "a": "\0" } }),
            400,
            "invalid_request",
            "`metadata`",
        ),
        (
            json!({ "metadata": { "a": "x".repeat(5000) } }),
            400,
            "invalid_request",
            "`metadata`",
        ),
        (json!({ "vcpu": 1 }), 400, "invalid_request", "vcpu"),
    ];
    for (body, status, code, field) in cases {
        let got = control.post("/v1/sandboxes", body.clone()).await;
        assert_failure(&got, status, code, &[field]);
    }
    assert_eq!(agent.calls("CreateSandbox"), 0);
    let (_, list) = control.get("/v1/sandboxes?status=all").await;
    assert_eq!(list, json!([]), "rejected requests leave no rows");
}

#[tokio::test]
async fn body_other_than_a_json_object_is_rejected() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let send = async |path: &str, kind: Option<&str>, body: Vec<u8>| {
        let mut request = control.request(Method::POST, path).body(body);
        if let Some(kind) = kind {
            request = request.header("Content-Type", kind);
        }
        answer(request).await
    };
    let json = Some("application/json");
    for body in [
        "{",
        "[]",
        "[\"minimal\"]",
        "7",
        "\"a\"",
        "null",
        "{} x",
        "{\"vcpus\":1,}",
        "\u{feff}{}",
    ] {
        let got = send("/v1/sandboxes", json, body.into()).await;
        assert_failure(&got, 400, "invalid_request", &[]);
    }
    let got = send("/v1/sandboxes", json, vec![b'{', 0xff, b'}']).await;
    assert_failure(&got, 400, "invalid_request", &[]);
    // The content type that `curl -d` sends, and a missing one, are accepted, but the body must be
    // JSON.
    for kind in [None, Some("application/x-www-form-urlencoded")] {
        let got = send("/v1/sandboxes", kind, b"{\"vcpus\":0}".to_vec()).await;
        assert_failure(&got, 400, "invalid_request", &["`vcpus`"]);
        let got = send("/v1/sandboxes", kind, b"vcpus=1".to_vec()).await;
        assert_failure(&got, 400, "invalid_request", &["JSON object"]);
    }
    for kind in [Some("text/plain"), Some("multipart/form-data; boundary=a")] {
        let got = send("/v1/sandboxes", kind, b"{}".to_vec()).await;
        assert_failure(&got, 415, "invalid_request", &["Content-Type"]);
    }
    let exec = format!("/v1/sandboxes/{id}/exec");
    let got = send(&exec, json, Vec::new()).await;
    assert_failure(&got, 400, "invalid_request", &["JSON object"]);
    let charset = Some("application/json; charset=utf-8");
    let (status, body) = send(&exec, charset, b"{\"cmd\":\"echo\"}".to_vec()).await;
    assert_eq!(status, StatusCode::OK, "{body}");
}

#[tokio::test]
async fn oversized_body_is_413_and_the_client_reads_it() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let body = vec![b' '; 3 << 20];
    let json = |body: reqwest::Body| {
        control
            .request(Method::POST, "/v1/sandboxes")
            .header("Content-Type", "application/json")
            .body(body)
    };
    let got = answer(json(body.clone().into())).await;
    assert_failure(&got, 413, "too_large", &["the body"]);
    // The same without a `Content-Length`.
    let pieces: Vec<_> = body
        .chunks(64 << 10)
        .map(|c| Ok::<_, std::io::Error>(c.to_vec()))
        .collect();
    let stream = futures::stream::iter(pieces);
    let got = answer(json(reqwest::Body::wrap_stream(stream))).await;
    assert_failure(&got, 413, "too_large", &["the body"]);
}

#[tokio::test]
async fn invalid_guest_call_names_the_field() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let cases: Vec<(&str, Value, &str)> = vec![
        ("exec", json!({}), "cmd"),
        ("exec", json!({ "cmd": "" }), "`cmd`"),
        ("exec", json!({ "cmd": "a\0b" }), "`cmd`"),
        (
            "exec",
            json!({ "cmd": "a", "args": ["b", "\0"] }),
            "`args[1]`",
        ),
        ("exec", json!({ "cmd": "a", "args": "b" }), "`args`"),
        (
            "exec",
            json!({ "cmd": "a", "timeout_sec": -1 }),
            "`timeout_sec`",
        ),
        ("exec", json!({ "cmd": "a", "cwd": "" }), "`cwd`"),
        ("exec", json!({ "cmd": "a", "user": "a:b" }), "`user`"),
        ("exec", json!({ "cmd": "a", "user": "" }), "`user`"),
        ("exec", json!({ "cmd": "a", "tag": "17" }), "`tag`"),
        ("exec", json!({ "cmd": "a", "tag": "a b" }), "`tag`"),
        ("exec", json!({ "cmd": "a", "envs": { "=": "" } }), "`envs`"),
        ("files/read", json!({ "path": "" }), "`path`"),
        ("files/read", json!({ "path": "/a\0" }), "`path`"),
        ("files/read", json!({ "path": "x".repeat(5000) }), "`path`"),
        ("files/stream/read", json!({}), "path"),
        ("files/list", json!({ "path": "/", "depth": -1 }), "`depth`"),
        (
            "files/list",
            json!({ "path": "/", "depth": 101 }),
            "`depth`",
        ),
        ("files/mkdir", json!({ "path": "" }), "`path`"),
        (
            "files/remove",
            json!({ "path": "/", "user": "a b" }),
            "`user`",
        ),
        ("fork", json!({ "count": 0 }), "`count`"),
        ("fork", json!({ "count": 101 }), "`count`"),
        ("fork", json!({ "counts": 1 }), "counts"),
    ];
    for (route, body, field) in cases {
        let got = control
            .post(&format!("/v1/sandboxes/{id}/{route}"), body)
            .await;
        assert_failure(&got, 400, "invalid_request", &[field]);
    }
    let got = control
        .delete(&format!("/v1/sandboxes/{id}/processes/1?signal=SIGHUP"))
        .await;
    assert_failure(&got, 400, "invalid_request", &["`signal`"]);
    for process in ["0", "99999999999", "a%20b", "..%2Fx"] {
        let got = control
            .delete(&format!("/v1/sandboxes/{id}/processes/{process}"))
            .await;
        assert_failure(&got, 400, "invalid_request", &["`process`"]);
    }
    for (query, field) in [
        ("limit=0", "`limit`"),
        ("limit=1001", "`limit`"),
        ("status=dead", "`status`"),
    ] {
        let got = control.get(&format!("/v1/sandboxes?{query}")).await;
        assert_failure(&got, 400, "invalid_request", &[field]);
    }
    assert_failure(
        &control.get("/v1/sandboxes?color=red").await,
        400,
        "invalid_request",
        &["color"],
    );
    assert_failure(
        &control.get("/v1/snapshots?type=big").await,
        400,
        "invalid_request",
        &["`type`"],
    );
    assert_failure(
        &control.get("/v1/snapshots/..%2Fx").await,
        400,
        "invalid_request",
        &["`name`"],
    );
    for (body, field) in [
        (json!({}), "sandbox_id"),
        (json!({ "sandbox_id": "x" }), "`sandbox_id`"),
        (json!({ "sandbox_id": id, "name": "../x" }), "`name`"),
    ] {
        let got = control.post("/v1/snapshots", body).await;
        assert_failure(&got, 400, "invalid_request", &[field]);
    }
    assert_failure(
        &control.post("/v1/api-keys", json!({ "name": " " })).await,
        400,
        "invalid_request",
        &["`name`"],
    );
    assert_eq!(agent.tunnels(), 0);
}

#[tokio::test]
async fn unknown_id_is_404_and_an_invalid_one_400_on_every_route() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let path = json!({ "path": "/a" });
    let none = Value::Null;
    let routes = [
        (Method::GET, "", none.clone()),
        (Method::DELETE, "", none.clone()),
        (Method::POST, "/ping", none.clone()),
        (Method::POST, "/pause", none.clone()),
        (Method::POST, "/resume", none.clone()),
        (Method::POST, "/fork", none.clone()),
        (Method::GET, "/metrics", none.clone()),
        (Method::POST, "/exec", json!({ "cmd": "a" })),
        (Method::GET, "/processes", none.clone()),
        (Method::DELETE, "/processes/1", none.clone()),
        (Method::POST, "/files/read", path.clone()),
        (Method::POST, "/files/list", path.clone()),
        (Method::POST, "/files/mkdir", path.clone()),
        (Method::POST, "/files/remove", path.clone()),
        (Method::POST, "/files/stream/read", path.clone()),
    ];
    for prefix in ["sandboxes", "capsules"] {
        for (method, route, body) in &routes {
            let unknown = format!("/v1/{prefix}/sb-00000000{route}");
            let got = control.call(method.clone(), &unknown, body).await;
            assert_failure(&got, 404, "not_found", &["sb-00000000"]);
            for id in ["x", "sb-", "SB-1"] {
                let strange = format!("/v1/{prefix}/{id}{route}");
                let got = control.call(method.clone(), &strange, body).await;
                assert_failure(&got, 404, "not_found", &[id]);
            }
            for id in ["sb-..%2F..%2Fetc", "..%2Fx", "sb-%00"] {
                let wrong = format!("/v1/{prefix}/{id}{route}");
                let got = control.call(method.clone(), &wrong, body).await;
                assert_failure(&got, 400, "invalid_request", &["`id`"]);
            }
        }
        for route in ["exec/stream", "pty", "processes/1/stream"] {
            let path = format!("/v1/{prefix}/sb-00000000/{route}");
            let got = Socket::try_open(&control, &path, Some(control.key()))
                .await
                .err()
                .unwrap();
            assert_failure(&got, 404, "not_found", &["sb-00000000"]);
        }
    }
    let got = control
        .post("/v1/snapshots", json!({ "sandbox_id": "sb-00000000" }))
        .await;
    assert_failure(&got, 404, "not_found", &["sb-00000000"]);
    assert_failure(
        &control.get("/v1/snapshots/nonesuch").await,
        404,
        "not_found",
        &["nonesuch"],
    );
    assert_failure(
        &control.delete("/v1/snapshots/nonesuch").await,
        404,
        "not_found",
        &["nonesuch"],
    );
    assert_failure(
        &control.get("/v1/nonesuch").await,
        404,
        "not_found",
        &["route"],
    );
    assert_failure(
        &control.call(Method::PUT, "/v1/sandboxes", &none).await,
        405,
        "invalid_request",
        &["method"],
    );
}
