//! Client commands against a fake server: their requests, output and exit codes.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failing test may panic"
)]

#[path = "fake/server.rs"]
mod server;

use std::process::Stdio;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use server::{DEADLINE, Fake, Script, finish, wrenn};
use tokio::{io::AsyncWriteExt, process::Child};

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Checks that standard error is one line that starts with the program's name, and returns it.
#[track_caller]
fn one_line(stderr: &[u8]) -> String {
    let text = text(stderr);
    assert!(text.starts_with("wrenn: "), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    text
}

fn signal(child: &Child, signal: Signal) {
    let pid = i32::try_from(child.id().unwrap()).unwrap();
    kill(Pid::from_raw(pid), signal).unwrap();
}

async fn exit_code(mut child: Child) -> Option<i32> {
    let ended = tokio::time::timeout(DEADLINE, child.wait()).await;
    ended.expect("an end in time").unwrap().code()
}

fn hello() -> Script {
    Script::Send(vec![
        json!({"type": "start", "pid": 7}),
        json!({"type": "stdout", "data": "/wAK", "encoding": "base64"}),
        json!({"type": "stderr", "data": "oops"}),
        json!({"type": "exit", "exit_code": 7}),
    ])
}

#[tokio::test]
async fn run_returns_bytes_and_exit_code_and_destroys_its_sandbox() {
    let fake = Fake::start(hello()).await;
    let out = finish(&mut fake.wrenn(&["run", "-e", "A=b", "--", "prog", "-x"])).await;
    assert_eq!(out.stdout, b"\xff\x00\n");
    assert_eq!(out.stderr, b"oops");
    assert_eq!(out.status.code(), Some(7));
    fake.called("DELETE /v1/sandboxes/sb-1").await;
    let start = fake.received("start").await;
    assert_eq!(
        (&start["cmd"], &start["args"]),
        (&json!("prog"), &json!(["-x"]))
    );
}

#[tokio::test]
async fn interrupted_run_destroys_its_sandbox() {
    for (sig, code) in [
        (Signal::SIGINT, 130),
        (Signal::SIGTERM, 143),
        (Signal::SIGHUP, 129),
    ] {
        let fake = Fake::start(Script::Hang).await;
        let child = fake.wrenn(&["run", "sleep", "9"]).spawn().unwrap();
        fake.received("start").await;
        signal(&child, sig);
        assert_eq!(exit_code(child).await, Some(code));
        fake.called("DELETE /v1/sandboxes/sb-1").await;
    }
}

#[tokio::test]
async fn run_interrupted_during_its_create_destroys_its_sandbox() {
    let fake = Fake::start_slow(Script::Hang).await;
    let child = fake.wrenn(&["run", "true"]).spawn().unwrap();
    fake.called("POST /v1/sandboxes").await;
    signal(&child, Signal::SIGINT);
    fake.release_create();
    assert_eq!(exit_code(child).await, Some(130));
    fake.called("DELETE /v1/sandboxes/sb-1").await;
    assert!(fake.messages().is_empty(), "{:?}", fake.messages());
}

#[tokio::test]
async fn a_stream_that_ends_without_an_exit_is_a_failure() {
    let fake = Fake::start(Script::Send(vec![
        json!({"type": "error", "data": "the guest agent is gone"}),
    ]))
    .await;
    let out = finish(&mut fake.wrenn(&["run", "true"])).await;
    assert_eq!(out.status.code(), Some(1));
    assert!(one_line(&out.stderr).contains("the guest agent is gone"));
    fake.called("DELETE /v1/sandboxes/sb-1").await;
}

#[tokio::test]
async fn program_that_cannot_run_gives_an_exit_code_as_in_a_shell() {
    for code in [127, 126] {
        let refusal = json!({
            "type": "error", "data": "error starting process: prog: cause", "fatal": true,
            "code": "invalid_request", "exit_code": code
        });
        let fake = Fake::start(Script::Send(vec![refusal])).await;
        for args in [
            &["run", "prog"][..],
            &["sandbox", "exec", "sb-1", "--", "prog"],
        ] {
            let out = finish(&mut fake.wrenn(args)).await;
            assert_eq!(out.status.code(), Some(code), "{out:?}");
            let line = one_line(&out.stderr);
            assert_eq!(line, "wrenn: error starting process: prog: cause\n");
        }
        fake.called("DELETE /v1/sandboxes/sb-1").await;
        for option in ["--json", "--background"] {
            let args = ["sandbox", "exec", option, "sb-1", "--", "prog"];
            let out = finish(&mut fake.wrenn(&args)).await;
            assert_eq!(out.status.code(), Some(code), "{out:?}");
            assert!(out.stdout.is_empty(), "{out:?}");
        }
    }
}

#[tokio::test]
async fn input_and_its_end_reach_the_command() {
    let fake = Fake::start(Script::Echo).await;
    let input: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
    let mut child = fake
        .wrenn(&["sandbox", "exec", "-i", "sb-1", "--", "cat"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let sent = input.clone();
    let writer = tokio::spawn(async move { stdin.write_all(&sent).await });
    let out = tokio::time::timeout(DEADLINE, child.wait_with_output())
        .await
        .expect("an end in time")
        .unwrap();
    writer.await.unwrap().unwrap();
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    assert!(out.stdout == input, "{} bytes came back", out.stdout.len());
}

#[tokio::test]
async fn an_interrupted_exec_ends_the_command() {
    let fake = Fake::start(Script::Hang).await;
    let child = fake
        .wrenn(&["sandbox", "exec", "sb-1", "sleep", "9"])
        .spawn()
        .unwrap();
    fake.received("start").await;
    signal(&child, Signal::SIGINT);
    assert_eq!(exit_code(child).await, Some(130));
    fake.received("stop").await;
    assert!(!fake.calls().iter().any(|c| c.starts_with("DELETE")));
}

#[tokio::test]
async fn closed_output_ends_the_command_quietly() {
    let fake = Fake::start(hello()).await;
    let mut child = fake.wrenn(&["run", "true"]).spawn().unwrap();
    drop(child.stdout.take());
    let out = tokio::time::timeout(DEADLINE, child.wait_with_output())
        .await
        .expect("an end in time")
        .unwrap();
    assert_eq!(out.status.code(), Some(141), "{out:?}");
    assert_eq!(text(&out.stderr), "");
    fake.called("DELETE /v1/sandboxes/sb-1").await;
}

#[tokio::test]
async fn a_list_is_a_table_ids_or_json() {
    let fake = Fake::start(Script::Hang).await;
    let plain = text(&finish(&mut fake.wrenn(&["sandbox", "ls"])).await.stdout);
    let lines: Vec<&str> = plain.lines().collect();
    assert!(lines[0].starts_with("ID "), "{plain}");
    assert!(lines[1].starts_with("sb-1  running  minimal "), "{plain}");
    assert!(lines[2].starts_with("sb-3  error "), "{plain}");
    assert_eq!(lines.len(), 3, "a destroyed one is not shown: {plain}");

    let ids = finish(&mut fake.wrenn(&["sandbox", "ls", "-qa"])).await;
    assert_eq!(text(&ids.stdout), "sb-1\nsb-2\nsb-3\n");

    let json = finish(&mut fake.wrenn(&["sandbox", "ls", "--json"])).await;
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json[0]["id"], "sb-1");
}

#[tokio::test]
async fn create_waits_and_prints_the_id() {
    let fake = Fake::start(Script::Hang).await;
    let out = finish(&mut fake.wrenn(&["sandbox", "create", "--memory", "256"])).await;
    assert_eq!(text(&out.stdout), "sb-1\n");
    fake.called("GET /v1/sandboxes/sb-1").await;

    let fake = Fake::start(Script::Hang).await;
    let out = finish(&mut fake.wrenn(&["sandbox", "create", "--no-wait"])).await;
    assert_eq!(text(&out.stdout), "sb-1\n");
    assert_eq!(fake.calls(), ["POST /v1/sandboxes"]);
}

#[tokio::test]
async fn failed_destroy_does_not_stop_the_others() {
    let fake = Fake::start(Script::Hang).await;
    let out = finish(&mut fake.wrenn(&["sandbox", "rm", "sb-9", "sb-1"])).await;
    assert_eq!(text(&out.stdout), "sb-1\n");
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(
        one_line(&out.stderr),
        "wrenn: failed to destroy sb-9: there is no such sandbox\n"
    );
}

#[tokio::test]
async fn file_is_copied_from_a_sandbox() {
    let fake = Fake::start(Script::Hang).await;
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().to_str().unwrap();
    let out = finish(&mut fake.wrenn(&["sandbox", "cp", "sb-1:/root/x", to])).await;
    assert!(out.status.success(), "{out:?}");
    let there = std::fs::read_to_string(dir.path().join("x")).unwrap();
    assert_eq!(there, "CONTENT");

    let out = finish(&mut fake.wrenn(&["sandbox", "cp", "sb-1:/root/x", "-"])).await;
    assert_eq!(text(&out.stdout), "CONTENT");
}

#[tokio::test]
async fn directory_is_rejected_with_the_command_that_copies_it() {
    let fake = Fake::start(Script::Hang).await;
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().to_str().unwrap();
    let out = finish(&mut fake.wrenn(&["sandbox", "cp", from, "sb-1:/root/"])).await;
    assert_eq!(out.status.code(), Some(1));
    let line = one_line(&out.stderr);
    assert!(
        line.contains("tar -cC") && line.contains("exec -i sb-1"),
        "{line}"
    );
    assert!(fake.calls().is_empty());
}

#[tokio::test]
async fn failures_are_one_line_and_exit_code_1() {
    let fake = Fake::start(Script::Hang).await;
    let gone = finish(&mut fake.wrenn(&["sandbox", "get", "sb-9"])).await;
    assert_eq!(gone.status.code(), Some(1));
    assert_eq!(one_line(&gone.stderr), "wrenn: there is no such sandbox\n");

    let no_terminal = finish(&mut fake.wrenn(&["sandbox", "shell", "sb-1"])).await;
    assert_eq!(no_terminal.status.code(), Some(1));
    assert!(one_line(&no_terminal.stderr).contains("exec -i sb-1"));

    let no_key = finish(wrenn(&["sandbox", "ls"]).env("WRENN_DIR", "/no/such")).await;
    assert_eq!(no_key.status.code(), Some(1));
    assert!(one_line(&no_key.stderr).contains("/no/such/api-key"));
}

#[tokio::test]
async fn invalid_command_lines_have_exit_code_2() {
    let lines: [&[&str]; 5] = [
        &["fly"],
        &["run"],
        &["sandbox", "cp", "a", "b"],
        &["supervise"],
        &["jail", "--dir", "/x"],
    ];
    for line in lines {
        let out = finish(&mut wrenn(line)).await;
        assert_eq!(out.status.code(), Some(2), "{line:?}: {out:?}");
        assert!(out.stdout.is_empty(), "{out:?}");
    }
}

#[tokio::test]
async fn invalid_settings_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("w.toml");
    std::fs::write(&file, "port = 1\n").unwrap();
    let out = finish(wrenn(&["sandbox", "ls"]).env("WRENN_CONFIG", &file)).await;
    assert_eq!(out.status.code(), Some(1));
    let line = one_line(&out.stderr);
    assert!(
        line.contains("w.toml: line 1") && line.contains("`port`"),
        "{line}"
    );
}

#[tokio::test]
async fn completions_are_made_for_the_usual_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let out = finish(&mut wrenn(&["completions", shell])).await;
        assert!(
            out.status.success() && text(&out.stdout).contains("sandbox"),
            "{shell}"
        );
    }
}

#[tokio::test]
async fn internal_command_names_the_directory_that_it_cannot_use() {
    let out = finish(&mut wrenn(&["supervise", "--dir", "/no/such/folder"])).await;
    assert_eq!(out.status.code(), Some(1));
    assert!(
        text(&out.stderr).starts_with("wrenn supervise: "),
        "{out:?}"
    );
}
