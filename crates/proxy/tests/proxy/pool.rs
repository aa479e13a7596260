//! Connections that are kept, counted, abandoned and closed.

use std::sync::atomic::Ordering;

use wrenn_model::SandboxId;
use wrenn_proxy::{DialError, ProxyConfig};

use crate::support::{ID, OTHER, Setup, get, request};

const EMPTY: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

fn id() -> SandboxId {
    ID.parse().unwrap()
}

#[tokio::test]
async fn connection_is_reused_for_the_next_request() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 80);
    let mut client = setup.client().await;
    client.send(&get("/1", ID, 80)).await;
    let mut guest = port.accept().await;
    guest.head().await;
    guest.send(EMPTY).await;
    client.answer().await;
    setup.until_unused().await;
    for path in ["/2", "/3"] {
        let mut client = setup.client().await;
        client.send(&get(path, ID, 80)).await;
        assert!(guest.head().await.starts_with(&format!("GET {path} ")));
        guest.send(EMPTY).await;
        assert_eq!(client.answer().await.status(), 200);
        setup.until_unused().await;
    }
    assert!(port.is_quiet());
}

#[tokio::test]
async fn idempotent_request_on_a_closed_connection_is_repeated() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 80);
    for (method, body, is_repeated) in
        [("GET", "", true), ("POST", "", false), ("PUT", "hi", false)]
    {
        let mut first = setup.client().await;
        first.send(&get("/", ID, 80)).await;
        let mut guest = port.accept().await;
        guest.head().await;
        guest.send(EMPTY).await;
        first.answer().await;
        setup.until_unused().await;
        let mut client = setup.client().await;
        let length = format!("Content-Length: {}\r\n", body.len());
        client
            .send(&request(&format!("{method} /"), ID, 80, &length))
            .await;
        client.send(body).await;
        guest.until(&format!("\r\n\r\n{body}")).await;
        drop(guest);
        if is_repeated {
            let mut again = port.accept().await;
            again.head().await;
            again.send(EMPTY).await;
            assert_eq!(client.answer().await.status(), 200);
            drop(again);
        } else {
            let answer = client.answer().await;
            assert_eq!(answer.status(), 502, "{method}");
            assert!(
                !answer.body.contains("was not found") && !answer.body.contains("port is not open")
            );
            assert!(port.is_quiet());
        }
        setup.until_unused().await;
    }
}

#[tokio::test]
async fn a_request_is_not_repeated_on_a_new_connection() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 80);
    let mut client = setup.client().await;
    client.send(&get("/", ID, 80)).await;
    let mut guest = port.accept().await;
    guest.head().await;
    drop(guest);
    assert_eq!(client.answer().await.status(), 502);
    assert!(port.is_quiet());
}

#[tokio::test]
async fn connections_per_sandbox_are_limited() {
    let setup = Setup::with(ProxyConfig {
        max_connections: 2,
        ..ProxyConfig::default()
    })
    .await;
    let mut port = setup.open(ID, 80);
    let mut other = setup.open(OTHER, 80);
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut client = setup.client().await;
        client.send(&get("/", ID, 80)).await;
        open.push((client, port.accept().await));
    }
    assert_eq!(setup.ask(&get("/", ID, 80)).await.status(), 429);
    let mut client = setup.client().await;
    client.send(&get("/", OTHER, 80)).await;
    other.accept().await.send(EMPTY).await;
    assert_eq!(client.answer().await.status(), 200);
    open.clear();
    setup.until_unused().await;
    let mut client = setup.client().await;
    client.send(&get("/", ID, 80)).await;
    port.accept().await.send(EMPTY).await;
    assert_eq!(client.answer().await.status(), 200);
}

#[tokio::test]
async fn stopped_sandbox_is_disconnected_and_not_found() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 49983);
    let mut streaming = setup.client().await;
    streaming.send(&get("/stream", ID, 49983)).await;
    let mut guest = port.accept().await;
    guest.head().await;
    guest
        .send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n")
        .await;
    streaming.until("hi\r\n").await;
    let mut waiting = setup.client().await;
    waiting
        .send(&request("POST /", ID, 49983, "Content-Length: 0\r\n"))
        .await;
    let mut asked = port.accept().await;
    asked.head().await;

    setup.world.sandboxes.lock().remove(ID);
    setup.kill_switch.forget(&id());

    assert!(streaming.is_ended().await);
    assert!(guest.is_ended().await && asked.is_ended().await);
    let answer = waiting.answer().await;
    assert!(
        answer.status() == 502 && answer.body.contains("was not found"),
        "{answer:?}"
    );
    let health = setup.ask(&get("/health", ID, 49983)).await;
    assert!(
        health.status() == 502 && health.body.contains("was not found"),
        "{health:?}"
    );
}

#[tokio::test]
async fn kept_connections_are_not_used_after_a_stop() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 80);
    for _ in 0..3 {
        let mut client = setup.client().await;
        client
            .send(&request("POST /", ID, 80, "Content-Length: 2\r\n"))
            .await;
        client.send("hi").await;
        let mut guest = port.accept().await;
        guest.until("\r\n\r\nhi").await;
        guest.send(EMPTY).await;
        assert_eq!(client.answer().await.status(), 200);
        // As after a pause and a resume.
        setup.kill_switch.forget(&id());
        assert!(guest.is_ended().await);
    }
}

#[tokio::test]
async fn paused_sandbox_is_resolved_again() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 80);
    setup.change(ID, |sandbox| {
        sandbox.dial_errors.push(DialError::NotRunning)
    });
    let mut client = setup.client().await;
    client
        .send(&request("POST /", ID, 80, "Content-Length: 2\r\n"))
        .await;
    client.send("hi").await;
    let mut guest = port.accept().await;
    guest.until("\r\n\r\nhi").await;
    guest.send(EMPTY).await;
    assert_eq!(client.answer().await.status(), 200);
    assert_eq!(setup.world.looked_up.load(Ordering::SeqCst), 1);
    assert_eq!(setup.world.resolved.load(Ordering::SeqCst), 1);
    setup.change(ID, |sandbox| {
        sandbox.dial_errors = vec![DialError::NotRunning; 3]
    });
    setup.kill_switch.forget(&id());
    let answer = setup.ask(&get("/", ID, 80)).await;
    assert!(
        answer.status() == 502 && answer.body.contains("was not found"),
        "{answer:?}"
    );
}
