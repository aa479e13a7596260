//! Bodies that are held in memory: they share a budget, and nothing grows beyond it.

use reqwest::{Method, StatusCode, header::RETRY_AFTER};
use serde_json::{Value, json};
use wrenn_control::Limits;

use crate::support::{
    Control, FakeAgent, Options, Socket, answer, assert_e2b_failure, assert_failure, until,
};

/// Budget of these tests, in bytes.
const BUDGET: usize = 500_000;

async fn start(agent: &FakeAgent) -> Control {
    start_with(agent, BUDGET).await
}

async fn start_with(agent: &FakeAgent, max_buffered_bytes: usize) -> Control {
    let limits = Limits {
        max_buffered_bytes,
        ..Limits::default()
    };
    let options = Options {
        limits,
        ..Options::default()
    };
    Control::start_with(agent, options).await
}

fn sh(script: &str) -> Value {
    json!({ "cmd": "sh", "args": ["-c", script] })
}

/// Asserts that a call is rejected because the buffers are used up, and returns its body.
async fn assert_exhausted(control: &Control, path: &str, body: &Value) -> Value {
    let request = control.request(Method::POST, path).json(body);
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()[RETRY_AFTER], "5");
    response.json().await.unwrap()
}

#[tokio::test]
async fn output_beyond_the_budget_is_dropped_and_marked() {
    let agent = FakeAgent::start().await;
    let control = start(&agent).await;
    let id = control.create().await;
    let path = format!("/v1/sandboxes/{id}/exec");
    let script = "head -c 400000 /dev/zero | tr '\\0' a; head -c 400000 /dev/zero >&2; exit 3";
    let (status, done) = control.post(&path, sh(script)).await;
    assert_eq!(
        (status, &done["exit_code"]),
        (StatusCode::OK, &json!(3)),
        "{:?}",
        done["truncated"]
    );
    let cut = &done["truncated"];
    assert_eq!(cut["limit"], "buffers", "{cut}");
    assert_eq!(cut["limit_bytes"], BUDGET, "{cut}");
    let kept = done["stdout"].as_str().unwrap().len() + done["stderr"].as_str().unwrap().len();
    let dropped = ["stdout_dropped_bytes", "stderr_dropped_bytes"];
    let dropped: u64 = dropped.iter().map(|n| cut[n].as_u64().unwrap()).sum();
    // The output and its JSON form exist at the same time.
    assert!(kept <= BUDGET / 2 && dropped > 0, "{kept} {cut}");
    assert_eq!(kept as u64 + dropped, 800_000, "{cut}");
    // The budget is free again.
    let script = "head -c 200000 /dev/zero | tr '\\0' a";
    let (_, done) = control.post(&path, sh(script)).await;
    assert_eq!(done.get("truncated"), None);
}

#[tokio::test]
async fn command_is_not_started_without_room_for_its_output() {
    // More than the sockets of a connection hold.
    const LARGE: usize = 50_000_000;
    let agent = FakeAgent::start().await;
    let control = start_with(&agent, LARGE).await;
    let id = control.create().await;
    let path = format!("/v1/sandboxes/{id}");
    let zeros = json!({ "path": agent.zeros(LARGE as u64 - 1000) });
    let reading = control.request(Method::POST, &format!("{path}/files/read"));
    let unread = reading.json(&zeros).send().await.unwrap();
    assert_eq!(unread.status(), StatusCode::OK);

    let exec = format!("{path}/exec");
    let touched = agent.path("touched");
    let touch = sh(&format!("touch {touched}"));
    let rejected = control.post(&exec, touch.clone()).await;
    let words = ["50000000 bytes", "WRENN_MAX_BUFFERED_MIB"];
    assert_failure(&rejected, 503, "resource_exhausted", &words);
    assert_exhausted(&control, &exec, &touch).await;
    assert!(!std::path::Path::new(&touched).exists());
    // A stream needs no room.
    let mut socket = Socket::open(&control, &format!("{exec}/stream")).await;
    socket.send(json!({ "type": "start", "cmd": "true" })).await;
    assert_eq!(socket.rest().await.last().unwrap()["exit_code"], 0);
    drop(unread);
    until("the budget is free again", async || {
        let (status, _) = control.post(&exec, touch.clone()).await;
        (status == StatusCode::OK).then_some(())
    })
    .await;
}

#[tokio::test]
async fn file_beyond_the_budget_is_streamed_if_its_length_is_known() {
    let agent = FakeAgent::start().await;
    let control = start(&agent).await;
    let id = control.create().await;
    let path = format!("/v1/sandboxes/{id}/files/read");
    let zeros = agent.zeros(3_000_000);
    let request = control.request(Method::POST, &path);
    let response = request
        .json(&json!({ "path": zeros }))
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.content_length(), Some(3_000_000));
    assert_eq!(response.bytes().await.unwrap().len(), 3_000_000);
    // The kernel's files have the length 0.
    let symbols = "/proc/kallsyms";
    assert!(std::fs::read(symbols).unwrap().len() > BUDGET);
    let body = assert_exhausted(&control, &path, &json!({ "path": symbols })).await;
    assert_eq!(body["error"]["code"], "resource_exhausted", "{body}");
}

#[tokio::test]
async fn lists_and_requests_are_accounted() {
    let agent = FakeAgent::start().await;
    let control = start(&agent).await;
    let id = control.create().await;
    let directory = agent.path("many");
    std::fs::create_dir(&directory).unwrap();
    let path = format!("/v1/sandboxes/{id}/files/list");
    let list = json!({ "path": directory });
    let (status, body) = control.post(&path, list.clone()).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    // First the response has no room, then the answer of the guest agent has none either.
    for files in [0..3000, 3000..10_000] {
        for n in files {
            std::fs::write(format!("{directory}/{n}"), "").unwrap();
        }
        let body = assert_exhausted(&control, &path, &list).await;
        assert_eq!(body["error"]["code"], "resource_exhausted", "{body}");
    }
    let (status, body) = control.post(&path, json!({ "path": "/nonesuch" })).await;
    assert_eq!(status, StatusCode::NOT_FOUND, "{body}");

    let large = json!({ "cmd": "true", "args": ["x".repeat(BUDGET + 100_000)] });
    assert_exhausted(&control, &format!("/v1/sandboxes/{id}/exec"), &large).await;
    let large =
        json!({ "templateID": "minimal", "metadata": { "x": "x".repeat(BUDGET + 100_000) } });
    assert_exhausted(&control, "/v2/sandboxes", &large).await;
    let request = control.request(Method::POST, "/v2/sandboxes").json(&large);
    assert_e2b_failure(&answer(request).await, 503, &["WRENN_MAX_BUFFERED_MIB"]);
    assert_eq!(control.create().await.len(), id.len());
}
