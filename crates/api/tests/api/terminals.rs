//! Terminals, over their WebSocket.

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use serde_json::json;

use crate::support::{Control, FakeAgent, Socket, until};

#[tokio::test]
async fn a_terminal_takes_input_sizes_and_clients_that_come_back() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let path = format!("/v1/sandboxes/{id}/pty");
    let mut socket = Socket::open(&control, &path).await;
    socket
        .send(json!({ "type": "start", "cols": 100, "rows": 30 }))
        .await;
    let started = socket.expect("started").await;
    let tag = started["tag"].as_str().unwrap().to_owned();
    assert!(tag.starts_with("pty-") && tag.len() == 12, "{tag}");
    let input = |text: &str| json!({ "type": "input", "data": BASE64.encode(text) });
    socket.send(input("one")).await;
    assert_eq!(socket.expect("output").await["data"], BASE64.encode("one"));
    socket
        .send(json!({ "type": "resize", "cols": 120, "rows": 40 }))
        .await;
    until("the size is set", async || {
        (agent.state.processes.sizes(&tag) == [(100, 30), (120, 40)]).then_some(())
    })
    .await;
    for bad in [
        json!({ "type": "resize", "cols": 0, "rows": 1 }),
        json!({ "type": "resize", "cols": 1, "rows": 70_000 }),
    ] {
        socket.send(bad).await;
        assert_eq!(socket.expect("error").await["fatal"], false);
    }
    drop(socket);
    assert!(
        agent.state.processes.runs(&tag),
        "the terminal outlives its client"
    );
    let mut socket = Socket::open(&control, &path).await;
    socket.send(json!({ "type": "connect", "tag": tag })).await;
    assert_eq!(socket.expect("started").await["pid"], started["pid"]);
    socket.send(input("two")).await;
    assert_eq!(socket.expect("output").await["data"], BASE64.encode("two"));
    socket.send(json!({ "type": "kill" })).await;
    assert_eq!(socket.expect("exit").await["error"], "signal: 9");
    assert_eq!(socket.next().await, None);
    for first in [
        json!({ "type": "connect", "tag": tag }),
        json!({ "type": "kill" }),
        json!({ "type": "start", "cols": 0 }),
    ] {
        let mut socket = Socket::open(&control, &path).await;
        socket.send(first).await;
        assert_eq!(socket.expect("error").await["fatal"], true);
        assert_eq!(socket.next().await, None);
    }
}

#[tokio::test]
async fn a_kill_after_a_burst_of_input_that_nobody_takes_kills() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let mut socket = Socket::open(&control, &format!("/v1/sandboxes/{id}/pty")).await;
    socket.send(json!({ "type": "start", "cmd": "deaf" })).await;
    let tag = socket.expect("started").await["tag"]
        .as_str()
        .unwrap()
        .to_owned();
    let keys = BASE64.encode("keys");
    for n in 0..2000 {
        socket.send(json!({ "type": "input", "data": keys })).await;
        if n % 100 == 0 {
            socket
                .send(json!({ "type": "resize", "cols": 1 + n, "rows": 1 }))
                .await;
        }
    }
    socket
        .send(json!({ "type": "resize", "cols": 7777, "rows": 1 }))
        .await;
    until("the last size is set", async || {
        (agent.state.processes.sizes(&tag).last() == Some(&(7777, 1))).then_some(())
    })
    .await;
    socket.send(json!({ "type": "kill" })).await;
    assert_eq!(socket.expect("exit").await["error"], "signal: 9");
    assert!(!agent.state.processes.runs(&tag));
}

#[tokio::test]
async fn typing_arrives_in_order_and_whole() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let mut socket = Socket::open(&control, &format!("/v1/sandboxes/{id}/pty")).await;
    socket.send(json!({ "type": "start" })).await;
    socket.expect("started").await;
    let mut wanted = String::new();
    for n in 0..1000 {
        let text = format!("{n} ");
        socket
            .send(json!({ "type": "input", "data": BASE64.encode(&text) }))
            .await;
        wanted.push_str(&text);
    }
    let mut got = String::new();
    while got.len() < wanted.len() {
        let output = socket.expect("output").await;
        got.push_str(
            std::str::from_utf8(&BASE64.decode(output["data"].as_str().unwrap()).unwrap()).unwrap(),
        );
    }
    assert_eq!(got, wanted);
}
