//! Creating sandboxes by the E2B API.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{
    Control, ErrorCode, FakeAgent, NOT_STOPPED, answer, assert_e2b_failure, assert_failure,
    create_and_leave, until,
};

#[tokio::test]
async fn both_versions_return_a_running_sandbox() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let body =
        json!({ "templateID": "minimal", "metadata": {}, "envVars": { "A": "1" }, "secure": true });
    for path in ["/v2/sandboxes", "/sandboxes"] {
        let (status, made) = control.post(path, body.clone()).await;
        assert_eq!(status, StatusCode::CREATED, "{made}");
        let id = made["sandboxID"].as_str().unwrap();
        assert!(id.starts_with('i') && id.len() == 21, "{id}");
        assert_eq!(made["templateID"], "minimal");
        assert_eq!(made["alias"], "minimal");
        assert_eq!(made["clientID"], "wrenn");
        assert_eq!(made["envdVersion"], "0.6.13");
        assert_eq!(made["envdAccessToken"], format!("token-of-{id}"));
        assert_eq!(made["domain"], Value::Null);
        assert_eq!(made["trafficAccessToken"], Value::Null);
        assert_eq!(agent.last_create().envs["A"], "1");
        // The sandbox is the same resource in both APIs.
        assert_eq!(control.status(id).await, "running");
    }
    let plain = control.create().await;
    let (status, seen) = control.get(&format!("/sandboxes/{plain}")).await;
    assert_eq!(
        (status, &seen["state"]),
        (StatusCode::OK, &json!("running"))
    );
}

#[tokio::test]
async fn record_has_the_requested_parameters() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let made = control
        .e2b_create(json!({
            "timeout": 500, "metadata": { "a": "b" }, "autoPause": true, "autoResume": { "enabled": true },
            "allow_internet_access": false,
            "network": { "allowOut": ["1.1.1.1"], "denyOut": ["0.0.0.0/0"], "allowPublicTraffic": false,
                         "maskRequestHost": "localhost:${PORT}" },
        }))
        .await;
    let id = made["sandboxID"].as_str().unwrap();
    let token = made["trafficAccessToken"].as_str().unwrap();
    assert_eq!(token.len(), 40);
    let asked = agent.last_create().network.into_option().unwrap();
    assert_eq!(
        (asked.allow, asked.deny),
        (vec!["1.1.1.1".to_owned()], vec!["0.0.0.0/0".to_owned()])
    );
    let (_, seen) = control.get(&format!("/sandboxes/{id}")).await;
    assert_eq!(seen["metadata"], json!({ "a": "b" }));
    assert_eq!(seen["allowInternetAccess"], false);
    assert_eq!(
        seen["lifecycle"],
        json!({ "autoResume": true, "onTimeout": "pause" })
    );
    assert_eq!(
        seen["network"],
        json!({ "allowOut": ["1.1.1.1"], "denyOut": ["0.0.0.0/0"], "allowPublicTraffic": false,
                "maskRequestHost": "localhost:${PORT}" })
    );
    for field in ["cpuCount", "memoryMB", "diskSizeMB"] {
        assert!(seen[field].as_u64().unwrap() > 0, "{field}");
    }
    assert_eq!(seen["envdAccessToken"], made["envdAccessToken"]);
    let time = |field: &str| {
        seen[field]
            .as_str()
            .unwrap()
            .parse::<jiff::Timestamp>()
            .unwrap()
    };
    let lives = time("endAt").as_second() - time("startedAt").as_second();
    assert!((499..=501).contains(&lives), "{lives}");
    assert!(seen["startedAt"].as_str().unwrap().ends_with('Z'));
    let (_, seen) = control
        .get(&format!("/sandboxes/{}", control.e2b_id(json!({})).await))
        .await;
    assert_eq!(seen["allowInternetAccess"], Value::Null);
    assert_eq!(seen["lifecycle"]["onTimeout"], "kill");
}

#[tokio::test]
async fn sandbox_of_the_first_version_requires_its_token() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    for secure in [
        json!({}),
        json!({ "secure": false }),
        json!({ "secure": true }),
    ] {
        let mut body = json!({ "templateID": "minimal", "timeout": 60 });
        let more = secure.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(more);
        let (status, made) = control.post("/sandboxes", body).await;
        assert_eq!(status, StatusCode::CREATED);
        let id = made["sandboxID"].as_str().unwrap();
        assert_eq!(
            made["envdAccessToken"],
            format!("token-of-{id}"),
            "{secure}"
        );
        let request = reqwest::Client::new()
            .get(format!("http://{}/envs", control.traffic()))
            .header("E2b-Sandbox-Id", id)
            .header("E2b-Sandbox-Port", 49983);
        assert_eq!(answer(request).await.0, StatusCode::UNAUTHORIZED);
    }
}

#[tokio::test]
async fn failed_create_has_an_error_code() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    for (code, status, error_code) in [
        (
            ErrorCode::ResourceExhausted,
            503,
            "sandbox_capacity_unavailable",
        ),
        (
            ErrorCode::DeadlineExceeded,
            504,
            "sandbox_placement_timeout",
        ),
        (
            ErrorCode::FailedPrecondition,
            503,
            "sandbox_no_compatible_node",
        ),
        (ErrorCode::Internal, 500, "sandbox_create_failed"),
    ] {
        agent.fail("CreateSandbox", code, "why it failed");
        let body = json!({ "templateID": "minimal" });
        let got = control.post("/v2/sandboxes", body).await;
        assert_e2b_failure(&got, status, &["why it failed"]);
        assert_eq!(got.1["error_code"], error_code);
    }
}

#[tokio::test]
async fn create_waits_for_the_sandbox_and_reports_failures() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.state.create_gate.shut();
    let (made, ()) = tokio::join!(control.e2b_create(json!({})), async {
        until("the host receives the create", async || {
            (agent.state.create_gate.waiting() == 1).then_some(())
        })
        .await;
        // A sandbox without a response is not visible to clients of this API.
        let (_, list) = control.get("/v2/sandboxes").await;
        assert_eq!(list, json!([]));
        agent.state.create_gate.open();
    });
    assert_eq!(
        control.status(made["sandboxID"].as_str().unwrap()).await,
        "running"
    );

    agent.fail(
        "CreateSandbox",
        ErrorCode::ResourceExhausted,
        "no memory left",
    );
    let request = control.request(Method::POST, "/v2/sandboxes");
    let response = request
        .json(&json!({ "templateID": "minimal" }))
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()["should-retry"], "false");
    let body: Value = response.json().await.unwrap();
    assert_eq!(
        body,
        json!({ "code": 503, "message": "no memory left", "error_code": "sandbox_capacity_unavailable" })
    );
    let (_, list) = control.get("/v2/sandboxes").await;
    assert_eq!(list.as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn disconnect_before_the_response_leaves_nothing() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.state.create_gate.shut();
    let request = control
        .request(Method::POST, "/v2/sandboxes")
        .json(&json!({ "templateID": "minimal" }));
    create_and_leave(&agent, request).await;
    until("the host receives the destroy", async || {
        (agent.calls("DestroySandbox") > 0).then_some(())
    })
    .await;
    agent.state.create_gate.open();
    until("all resources are freed", async || {
        let (_, list) = control.get(NOT_STOPPED).await;
        (list == json!([]) && agent.ids().is_empty()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn create_errors_have_the_form_of_the_e2b_api() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    for (body, status, words) in [
        (
            json!({ "templateID": "code-interpreter-v1" }),
            404,
            "code-interpreter-v1",
        ),
        (
            json!({ "templateID": "other/minimal" }),
            404,
            "was not found",
        ),
        (json!({ "templateID": "minimal:v9" }), 404, "minimal..v9"),
        (json!({}), 400, "templateID"),
        (json!({ "templateID": 7 }), 400, "templateID"),
        (
            json!({ "templateID": "minimal", "timeout": 0 }),
            400,
            "timeout",
        ),
        (
            json!({ "templateID": "minimal", "iam": { "tokens": { "x": {} } } }),
            501,
            "iam",
        ),
        (
            json!({ "templateID": "minimal", "network": { "allowOut": ["x.org"] } }),
            400,
            "0.0.0.0/0",
        ),
    ] {
        let got = control.post("/v2/sandboxes", body).await;
        assert_e2b_failure(&got, status, &[words]);
    }
    let request = control.request(Method::POST, "/v2/sandboxes");
    let request = request.header("content-type", "application/json").body("[");
    assert_e2b_failure(&answer(request).await, 400, &["object"]);
    assert!(agent.ids().is_empty());
}

#[tokio::test]
async fn mcp_gateway_started_by_the_client_is_accepted() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let made = control
        .e2b_create(json!({ "mcp": { "github": { "token": "x" } } }))
        .await;
    assert_eq!(made["templateID"], "minimal");
    // This server has no template of the name that clients use for `mcp`.
    let body = json!({ "templateID": "mcp-gateway", "mcp": { "x": {} } });
    let got = control.post("/v2/sandboxes", body).await;
    assert_e2b_failure(&got, 404, &["mcp-gateway"]);
}

#[tokio::test]
async fn keys_of_both_forms_are_accepted_and_errors_have_the_form_of_their_api() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let client = reqwest::Client::new();
    let e2b = control.e2b_key();
    assert!(e2b.starts_with("e2b_") && e2b.len() == 44);
    for key in [control.key(), &e2b] {
        for path in ["/v2/sandboxes", "/v1/sandboxes"] {
            let request = client.get(control.url(path)).header("X-API-Key", key);
            assert_eq!(answer(request).await.0, StatusCode::OK, "{path}");
        }
    }
    let wrong = format!("e2b_{}", "0".repeat(40));
    for key in ["", "e2b_", &wrong] {
        let request = client
            .get(control.url("/v2/sandboxes"))
            .header("X-API-Key", key);
        assert_e2b_failure(&answer(request).await, 401, &["X-API-Key"]);
        let request = client
            .get(control.url("/v1/sandboxes"))
            .header("X-API-Key", key);
        assert_failure(&answer(request).await, 401, "unauthorized", &["X-API-Key"]);
    }
    let got = answer(client.post(control.url("/sandboxes"))).await;
    assert_e2b_failure(&got, 401, &["X-API-Key"]);
    let (status, made) = control
        .post("/v1/api-keys", json!({ "name": "x", "e2b": true }))
        .await;
    assert_eq!(status, StatusCode::CREATED);
    assert!(made["key"].as_str().unwrap().starts_with("e2b_"), "{made}");
}

#[tokio::test]
async fn unimplemented_calls_answer_501() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    for (method, path) in [
        (Method::POST, "/v3/templates"),
        (Method::POST, "/v2/templates/a/builds/b"),
        (Method::GET, "/templates/a/builds/b/status"),
        (Method::GET, "/templates/a/files/b"),
        (Method::GET, "/templates/a"),
        (Method::POST, "/templates/tags"),
        (Method::DELETE, "/templates/tags"),
        (Method::GET, "/volumes"),
        (Method::POST, "/secrets"),
        (Method::GET, "/sandboxes/i0/logs"),
        (Method::GET, "/teams"),
        (Method::GET, "/teams/x/metrics/max"),
        (Method::POST, "/api-keys"),
        (Method::DELETE, "/api-keys/x"),
        (Method::GET, "/events/sandboxes"),
        (Method::POST, "/events/webhooks"),
        (Method::GET, "/nodes"),
        (Method::GET, "/admin/teams"),
        (Method::GET, "/clusters"),
    ] {
        let got = control.call(method.clone(), path, &Value::Null).await;
        assert_e2b_failure(&got, 501, &["not implemented"]);
    }
    // Clients of a volume send the volume's token, and no API key.
    let client = reqwest::Client::new();
    for (method, what) in [
        (Method::GET, "path"),
        (Method::GET, "dir"),
        (Method::POST, "dir"),
        (Method::PUT, "file"),
        (Method::PATCH, "path"),
        (Method::DELETE, "path"),
    ] {
        let url = control.url(&format!("/volumecontent/vol/{what}?path=%2Fa"));
        let request = client.request(method, url).bearer_auth("of-the-volume");
        assert_e2b_failure(&answer(request).await, 501, &["volumes"]);
    }
    for path in ["/volumes", "/secrets", "/v1/sandboxes"] {
        let request = client.get(control.url(path)).bearer_auth("of-the-volume");
        assert_eq!(answer(request).await.0, StatusCode::UNAUTHORIZED, "{path}");
    }
    for path in ["/teams", "/admin", "/clusters"] {
        let got = answer(client.get(control.url(path))).await;
        assert_e2b_failure(&got, 401, &["X-API-Key"]);
    }
    for path in ["/volumes/a/b/c", "/secrets/a/b/c"] {
        let got = control.get(path).await;
        assert_e2b_failure(&got, 404, &["no such route"]);
    }
    let got = control.get("/v2/nonesuch").await;
    assert_e2b_failure(&got, 404, &["no such route"]);
    let got = control
        .call(Method::PUT, "/v2/sandboxes", &Value::Null)
        .await;
    assert_e2b_failure(&got, 405, &["method"]);
}
