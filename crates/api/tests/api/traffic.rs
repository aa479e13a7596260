//! Control plane decisions on requests to ports of sandboxes.

use std::sync::atomic::Ordering;

use reqwest::StatusCode;
use serde_json::{Value, json};
use sqlx::Connection as _;

use crate::support::{Control, FakeAgent, Options, Socket, answer, assert_failure};

async fn visit(control: &Control, id: &str, port: u16) -> (StatusCode, Value) {
    let request = reqwest::Client::new()
        .get(format!("http://{}/health", control.traffic()))
        .header("E2b-Sandbox-Id", id)
        .header("E2b-Sandbox-Port", port);
    answer(request).await
}

/// Calls a port of a sandbox with additional headers.
async fn call(
    control: &Control,
    id: &str,
    (port, path): (u16, &str),
    headers: &[(&str, &str)],
) -> StatusCode {
    let mut request = reqwest::Client::new()
        .get(format!("http://{}{path}", control.traffic()))
        .header("E2b-Sandbox-Id", id)
        .header("E2b-Sandbox-Port", port);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.send().await.unwrap().status()
}

#[tokio::test]
async fn request_without_access_resumes_no_sandbox() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let made = control
        .e2b_create(json!({
            "autoPause": true, "autoResume": { "enabled": true },
            "network": { "allowPublicTraffic": false },
        }))
        .await;
    let id = made["sandboxID"].as_str().unwrap();
    let pause = async || {
        let path = format!("/sandboxes/{id}/pause");
        assert_eq!(
            control.post(&path, json!({})).await.0,
            StatusCode::NO_CONTENT
        );
    };
    pause().await;
    let (server, guest) = ((8080, "/"), (49983, "/envs"));
    let forged = (49983, "/files?path=/a&signature=v1_x");
    for (to, headers, status) in [
        (server, &[][..], StatusCode::FORBIDDEN),
        (
            server,
            &[("E2B-Traffic-Access-Token", "x")],
            StatusCode::FORBIDDEN,
        ),
        (guest, &[], StatusCode::UNAUTHORIZED),
        (guest, &[("X-Access-Token", "x")], StatusCode::UNAUTHORIZED),
        (forged, &[], StatusCode::UNAUTHORIZED),
        ((49983, "/health"), &[], StatusCode::BAD_GATEWAY),
    ] {
        assert_eq!(
            call(&control, id, to, headers).await,
            status,
            "{to:?} {headers:?}"
        );
    }
    assert_eq!(control.status(id).await, "paused");
    assert_eq!(agent.calls("ResumeSandbox"), 0);
    let told = |field: &str| made[field].as_str().unwrap();
    let traffic = [("E2B-Traffic-Access-Token", told("trafficAccessToken"))];
    // The fake guest has no server at this port.
    let got = call(&control, id, server, &traffic).await;
    assert_eq!(got, StatusCode::BAD_GATEWAY);
    assert_eq!(control.status(id).await, "running");
    pause().await;
    let token = [("X-Access-Token", told("envdAccessToken"))];
    assert_eq!(call(&control, id, guest, &token).await, StatusCode::OK);
    assert_eq!(agent.calls("ResumeSandbox"), 2);
}

/// Calls the guest agent's port without naming a sandbox.
async fn call_unaddressed(control: &Control, path: &str, token: Option<&str>) -> StatusCode {
    let mut request = reqwest::Client::new().get(format!("http://{}{path}", control.traffic()));
    if let Some(token) = token {
        request = request.header("X-Access-Token", token);
    }
    request.send().await.unwrap().status()
}

/// Returns path and query of a link to a file, as an SDK builds it.
fn link(path: &str, token: &str) -> String {
    let grant = wrenn_proto::Grant {
        path,
        operation: "read",
        user: "",
        expires: None,
    };
    let signature = grant.sign(token).replace('+', "%2B").replace('/', "%2F");
    format!("/files?path={path}&signature={signature}")
}

#[tokio::test]
async fn unaddressed_request_is_routed_by_token_or_link() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let file = agent.zeros(3);
    let id = control.e2b_id(json!({})).await;
    let other = control.e2b_id(json!({})).await;
    let token = |id: &str| format!("token-of-{id}");
    for (id, wrong) in [(&id, &other), (&other, &id)] {
        let got = call_unaddressed(&control, "/envs", Some(&token(id))).await;
        assert_eq!(got, StatusCode::OK);
        // The second request finds the link's sandbox without a search.
        for _ in 0..2 {
            let got = call_unaddressed(&control, &link(&file, &token(id)), None).await;
            assert_eq!(got, StatusCode::OK);
        }
        let named = |named: &str| format!("{}&sandbox_id={named}", link(&file, &token(id)));
        let got = call_unaddressed(&control, &named(id), None).await;
        assert_eq!(got, StatusCode::OK);
        // The named sandbox must have signed the link.
        let got = call_unaddressed(&control, &named(wrong), None).await;
        assert_eq!(got, StatusCode::BAD_REQUEST);
    }
    let forged = link(&file, "token-of-no-sandbox");
    let got = call_unaddressed(&control, &forged, None).await;
    assert_eq!(got, StatusCode::BAD_REQUEST);
    let got = call_unaddressed(&control, "/envs", Some("token-of-no-sandbox")).await;
    assert_eq!(got, StatusCode::BAD_GATEWAY);
    let path = format!("/sandboxes/{id}");
    assert_eq!(control.delete(&path).await.0, StatusCode::NO_CONTENT);
    let got = call_unaddressed(&control, "/health", Some(&token(&id))).await;
    assert_eq!(got, StatusCode::BAD_GATEWAY);
    let got = call_unaddressed(&control, &link(&file, &token(&id)), None).await;
    assert_eq!(got, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn sandbox_of_an_earlier_release_is_found_by_its_token() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let dir = control.stop().await;
    let rows = format!("sqlite://{}/wrenn.db", dir.path().display());
    let mut rows = sqlx::SqliteConnection::connect(&rows).await.unwrap();
    let older = sqlx::query("UPDATE sandboxes SET token_hash = ''");
    let older = older.execute(&mut rows).await.unwrap();
    assert_eq!(older.rows_affected(), 1);
    rows.close().await.unwrap();
    let options = Options {
        dir,
        ..Options::default()
    };
    let control = Control::start_with(&agent, options).await;
    let token = format!("token-of-{id}");
    let got = call_unaddressed(&control, "/envs", Some(&token)).await;
    assert_eq!(got, StatusCode::OK);
}

fn message(got: &(StatusCode, Value)) -> &str {
    got.1["message"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn sandbox_is_reachable_only_while_it_runs() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.e2b_id(json!({})).await;
    let got = visit(&control, &id, 49983).await;
    assert_eq!(got.0, StatusCode::NO_CONTENT, "{}", got.1);
    let got = visit(&control, &id, 8080).await;
    assert_eq!(got.0, StatusCode::BAD_GATEWAY);
    assert!(message(&got).contains("port is not open"), "{}", got.1);
    let (status, _) = control
        .post(&format!("/sandboxes/{id}/pause"), json!({}))
        .await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let got = visit(&control, &id, 49983).await;
    assert_eq!(got.0, StatusCode::BAD_GATEWAY);
    assert!(message(&got).contains("was not found"), "{}", got.1);
    let (status, _) = control
        .post(&format!("/sandboxes/{id}/connect"), json!({}))
        .await;
    assert_eq!(status, StatusCode::CREATED);
    let got = visit(&control, &id, 49983).await;
    assert_eq!(got.0, StatusCode::NO_CONTENT, "{}", got.1);
    assert_eq!(
        control.delete(&format!("/sandboxes/{id}")).await.0,
        StatusCode::NO_CONTENT
    );
    assert!(message(&visit(&control, &id, 49983).await).contains("was not found"));
    let unknown = visit(&control, "i00000000000000000000", 49983).await;
    assert!(message(&unknown).contains("was not found"));
}

#[tokio::test]
async fn traffic_resumes_a_sandbox_with_auto_resume() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control
        .e2b_id(json!({ "autoPause": true, "autoResume": { "enabled": true } }))
        .await;
    let (status, _) = control
        .post(&format!("/sandboxes/{id}/pause"), json!({}))
        .await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let got = visit(&control, &id, 8080).await;
    assert!(message(&got).contains("port is not open"), "{}", got.1);
    assert_eq!(control.status(&id).await, "running");
    assert_eq!(agent.calls("ResumeSandbox"), 1);
}

#[tokio::test]
async fn port_requires_the_traffic_token() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control
        .e2b_id(json!({ "network": { "allowPublicTraffic": false } }))
        .await;
    assert_eq!(visit(&control, &id, 8080).await.0, StatusCode::FORBIDDEN);
    let got = visit(&control, &id, 49983).await;
    assert_eq!(got.0, StatusCode::NO_CONTENT, "{}", got.1);
}

#[tokio::test]
async fn disk_only_pause_is_resumed_by_a_connect_only() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control
        .e2b_id(json!({ "autoPause": true, "autoResume": { "enabled": true } }))
        .await;
    let path = format!("/sandboxes/{id}");
    let (status, _) = control
        .post(&format!("{path}/pause"), json!({ "memory": false }))
        .await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    for port in [49983, 8080] {
        let got = visit(&control, &id, port).await;
        assert_eq!(got.0, StatusCode::BAD_GATEWAY);
        assert!(message(&got).contains("was not found"), "{}", got.1);
    }
    let got = control
        .post(
            &format!("/v1/sandboxes/{id}/exec"),
            json!({ "cmd": "echo" }),
        )
        .await;
    assert_failure(&got, 409, "invalid_state", &["`paused`"]);
    let got = Socket::try_open(
        &control,
        &format!("/v1/sandboxes/{id}/pty"),
        Some(control.key()),
    )
    .await;
    assert_failure(&got.err().unwrap(), 409, "invalid_state", &["`paused`"]);
    assert_eq!(agent.calls("ResumeSandbox"), 0);
    let (status, _) = control.post(&format!("{path}/connect"), json!({})).await;
    assert_eq!(status, StatusCode::CREATED);
    assert!(agent.state.cold_boot.load(Ordering::SeqCst));
    assert!(message(&visit(&control, &id, 8080).await).contains("port is not open"));
    // After a pause with memory, the resume uses the memory again.
    let (status, _) = control.post(&format!("{path}/pause"), json!({})).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert!(message(&visit(&control, &id, 8080).await).contains("port is not open"));
    assert!(!agent.state.cold_boot.load(Ordering::SeqCst));
}

#[tokio::test]
async fn sandbox_resumed_by_a_call_lives_at_least_five_minutes() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    for (timeout, wanted) in [(20, 300), (1000, 1000)] {
        let id = control
            .e2b_id(
                json!({ "timeout": timeout, "autoPause": true, "autoResume": { "enabled": true } }),
            )
            .await;
        for by_traffic in [true, false] {
            let (status, _) = control
                .post(&format!("/sandboxes/{id}/pause"), json!({}))
                .await;
            assert_eq!(status, StatusCode::NO_CONTENT);
            let before = jiff::Timestamp::now();
            if by_traffic {
                visit(&control, &id, 8080).await;
            } else {
                let exec = format!("/v1/sandboxes/{id}/exec");
                let (status, body) = control.post(&exec, json!({ "cmd": "echo" })).await;
                assert_eq!(status, StatusCode::OK, "{body}");
            }
            let (_, row) = control.get(&format!("/v1/sandboxes/{id}")).await;
            let end: jiff::Timestamp = row["expires_at"].as_str().unwrap().parse().unwrap();
            let left = end.as_second() - before.as_second();
            assert!((wanted - 1..=wanted + 10).contains(&left), "{left}");
        }
    }
    // A sandbox without a deadline gets none.
    let body = json!({ "auto_resume": true });
    let (_, made) = control.post("/v1/sandboxes", body).await;
    let id = made["id"].as_str().unwrap();
    let path = format!("/v1/sandboxes/{id}");
    let (status, _) = control.post(&format!("{path}/pause"), Value::Null).await;
    assert_eq!(status, StatusCode::OK);
    visit(&control, id, 8080).await;
    let (_, row) = control.get(&path).await;
    assert_eq!(row["status"], "running");
    assert!(row.get("expires_at").is_none_or(Value::is_null), "{row}");
}
