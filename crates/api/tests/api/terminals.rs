//! Terminals, over their WebSocket.

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use serde_json::json;

use crate::support::{Control, FakeAgent, Socket, assert_failure, until};

/// Returns the first message for a terminal without echo in which a program runs.
fn raw(program: &str) -> serde_json::Value {
    let script = format!("stty raw -echo; printf ready; exec {program}");
    json!({ "type": "start", "cmd": "sh", "args": ["-c", script], "cols": 100, "rows": 30 })
}

/// Waits until the program of [`raw`] runs.
async fn ready(socket: &mut Socket) {
    assert_eq!(output(socket, 5).await, "ready");
}

/// Returns the next output of a length.
async fn output(socket: &mut Socket, length: usize) -> String {
    let mut got = Vec::new();
    while got.len() < length {
        let output = socket.expect("output").await;
        got.extend(BASE64.decode(output["data"].as_str().unwrap()).unwrap());
    }
    String::from_utf8(got).unwrap()
}

/// Returns the size of a process's terminal, as columns and rows.
fn size(pid: &serde_json::Value) -> (u32, u32) {
    let terminal = format!("/proc/{pid}/fd/0");
    let told = std::process::Command::new("stty")
        .args(["-F", &terminal, "size"])
        .output()
        .unwrap();
    let told = String::from_utf8(told.stdout).unwrap();
    let mut numbers = told.split_whitespace().map(|n| n.parse().unwrap());
    let rows = numbers.next().unwrap_or_default();
    (numbers.next().unwrap_or_default(), rows)
}

fn runs(pid: &serde_json::Value) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

#[tokio::test]
async fn a_terminal_runs_a_shell_unless_its_client_names_a_program() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let mut socket = Socket::open(&control, &format!("/v1/sandboxes/{id}/pty?output=base64")).await;
    socket.send(json!({ "type": "start" })).await;
    let started = socket.expect("started").await;
    let (_, list) = control.get(&format!("/v1/sandboxes/{id}/processes")).await;
    assert_eq!(
        list["processes"],
        json!([{ "pid": started["pid"], "tag": started["tag"], "cmd": "/bin/bash", "args": [] }])
    );
    assert_eq!(size(&started["pid"]), (80, 24));
    let exit = json!({ "type": "input", "data": BASE64.encode("exit 3\r") });
    socket.send(exit).await;
    let told = socket.rest().await;
    assert_eq!(told.last().unwrap()["exit_code"], 3, "{told:?}");
}

#[tokio::test]
async fn terminal_accepts_input_sizes_and_reconnects() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let path = format!("/v1/sandboxes/{id}/pty?output=base64");
    let mut socket = Socket::open(&control, &path).await;
    socket.send(raw("cat")).await;
    let started = socket.expect("started").await;
    let pid = &started["pid"];
    ready(&mut socket).await;
    assert_eq!(size(pid), (100, 30));
    let tag = started["tag"].as_str().unwrap().to_owned();
    assert!(tag.starts_with("pty-") && tag.len() == 28, "{tag}");
    let input = |text: &str| json!({ "type": "input", "data": BASE64.encode(text) });
    socket.send(input("one")).await;
    assert_eq!(output(&mut socket, 3).await, "one");
    socket
        .send(json!({ "type": "resize", "cols": 120, "rows": 40 }))
        .await;
    until("the size is set", async || {
        (size(pid) == (120, 40)).then_some(())
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
    assert!(runs(pid), "the terminal outlives its client");
    let mut socket = Socket::open(&control, &path).await;
    socket.send(json!({ "type": "connect", "tag": tag })).await;
    assert_eq!(socket.expect("started").await["pid"], started["pid"]);
    socket.send(input("two")).await;
    assert_eq!(output(&mut socket, 3).await, "two");
    socket.send(json!({ "type": "kill" })).await;
    assert_eq!(socket.expect("exit").await["error"], "signal: killed");
    assert_eq!(socket.next().await, None);
    for first in [
        json!({ "type": "connect", "tag": "pty-00000000" }),
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
async fn kill_works_while_input_is_queued() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let mut socket = Socket::open(&control, &format!("/v1/sandboxes/{id}/pty?output=base64")).await;
    socket.send(raw("sleep 1000")).await;
    let started = socket.expect("started").await;
    let pid = &started["pid"];
    ready(&mut socket).await;
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
        (size(pid) == (7777, 1)).then_some(())
    })
    .await;
    socket.send(json!({ "type": "kill" })).await;
    assert_eq!(socket.expect("exit").await["error"], "signal: killed");
    assert!(!runs(pid));
}

#[tokio::test]
async fn terminal_input_arrives_in_order_and_complete() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let mut socket = Socket::open(&control, &format!("/v1/sandboxes/{id}/pty?output=base64")).await;
    socket.send(raw("cat")).await;
    socket.expect("started").await;
    ready(&mut socket).await;
    let mut wanted = String::new();
    for n in 0..1000 {
        let text = format!("{n} ");
        socket
            .send(json!({ "type": "input", "data": BASE64.encode(&text) }))
            .await;
        wanted.push_str(&text);
    }
    assert_eq!(output(&mut socket, wanted.len()).await, wanted);
}

#[tokio::test]
async fn binary_frames_carry_input_and_output_verbatim() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let path = format!("/v1/sandboxes/{id}/pty");
    let mut socket = Socket::open(&control, &path).await;
    socket.send(raw("cat")).await;
    let started = socket.expect("started").await;
    // A client that has sent no input gets binary frames, too.
    assert_eq!(socket.binary(5).await, b"ready");
    let bytes = [0xff, 0, b'{', 0x80, b'\n'];
    socket.send(json!({ "type": "pong" })).await;
    socket.send_binary(bytes.to_vec()).await;
    assert_eq!(socket.binary(bytes.len()).await, bytes);
    // The form of the output follows that of the input.
    let input = json!({ "type": "input", "data": BASE64.encode("one") });
    socket.send(input).await;
    assert_eq!(output(&mut socket, 3).await, "one");
    drop(socket);

    let mut socket = Socket::open(&control, &path).await;
    let tag = &started["tag"];
    socket.send(json!({ "type": "connect", "tag": tag })).await;
    socket.send_binary(b"two".to_vec()).await;
    assert_eq!(socket.expect("started").await["pid"], started["pid"]);
    assert_eq!(socket.binary(3).await, b"two");
    socket.send(json!({ "type": "kill" })).await;
    assert_eq!(socket.expect("exit").await["error"], "signal: killed");
}

#[tokio::test]
async fn client_whose_first_input_is_base64_gets_no_binary_frame() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let mut socket = Socket::open(&control, &format!("/v1/sandboxes/{id}/pty")).await;
    socket.send(raw("sh")).await;
    let exit = json!({ "type": "input", "data": BASE64.encode("exit 3\n") });
    socket.send(exit).await;
    let told = socket.rest().await;
    let outputs = told.iter().filter(|m| m["type"] == "output").count();
    assert!(outputs > 0, "{told:?}");
    assert_eq!(told.last().unwrap()["exit_code"], 3, "{told:?}");
}

#[tokio::test]
async fn form_of_the_output_can_be_requested() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let path = format!("/v1/sandboxes/{id}/pty");
    let mut socket = Socket::open(&control, &format!("{path}?output=binary")).await;
    socket.send(raw("cat")).await;
    socket
        .send(json!({ "type": "input", "data": BASE64.encode("one") }))
        .await;
    socket.expect("started").await;
    // The echo of the input may be in the same frame.
    let output = socket.binary(5).await;
    assert!(output.windows(5).any(|part| part == b"ready"), "{output:?}");
    let got = Socket::try_open(&control, &format!("{path}?output=hex"), Some(control.key())).await;
    let got = got.err().unwrap();
    assert_failure(&got, 400, "invalid_request", &["output"]);
}
