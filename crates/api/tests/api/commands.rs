//! Commands, by the waiting call and by the streams.

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use reqwest::StatusCode;
use serde_json::{Value, json};

use wrenn_proto::rpc::hostagent::v1::SandboxState;

use crate::support::{Control, ErrorCode, FakeAgent, Socket, TUNNEL, assert_failure, until};

/// Returns the body of a call that runs a shell script.
pub(crate) fn sh(script: &str) -> Value {
    json!({ "cmd": "sh", "args": ["-c", script] })
}

/// Returns a guest agent's answer to `Start`: a stream that ends at once with an error.
fn refusal(code: ErrorCode, message: &str) -> Vec<u8> {
    let error = json!({ "error": { "code": code.as_str(), "message": message } }).to_string();
    let length = u32::try_from(error.len()).unwrap();
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/connect+proto\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n",
        error.len() + 5
    );
    // An envelope: flags (2: end of the stream), length, content.
    let envelope = [&[2], &length.to_be_bytes()[..], error.as_bytes()].concat();
    [head.into_bytes(), envelope].concat()
}

pub(crate) async fn exec(control: &Control, id: &str, body: Value) -> (StatusCode, Value) {
    control
        .post(&format!("/v1/sandboxes/{id}/exec"), body)
        .await
}

#[tokio::test]
async fn command_gets_its_environment_and_its_output_is_text_or_base64() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let script = r#"printf %s "$A,$B|$PWD|$(id -un)""#;
    let mut command = json!({
        "cmd": "sh", "args": ["-c", script], "envs": { "B": "2", "A": "ü=1" }, "cwd": "/tmp",
        "user": "nobody", "timeout_sec": 7
    });
    let (_, done) = exec(&control, &id, command.clone()).await;
    assert_eq!(done["stdout"], "ü=1,2|/tmp|nobody", "{done}");
    assert!(agent.heard().contains("connect-timeout-ms: 7000\r\n"));
    command["timeout_sec"] = Value::Null;
    exec(&control, &id, command.clone()).await;
    let heard = agent.heard();
    assert!(
        heard.contains("connect-timeout-ms: 30000\r\n"),
        "a timeout is always sent: {heard}"
    );
    command["timeout_sec"] = json!(0);
    exec(&control, &id, command).await;
    assert!(!agent.heard().contains("connect-timeout-ms"));
    let (_, done) = exec(&control, &id, sh(r"printf '\377\0a'")).await;
    assert_eq!(
        (&done["encoding"], &done["stdout"]),
        (&json!("base64"), &json!("/wBh"))
    );
    assert_eq!(done["stderr"], "");
    let (_, done) = exec(&control, &id, sh(r"printf '\303'; printf '\274'")).await;
    assert_eq!(
        (&done["encoding"], &done["stdout"]),
        (&json!("utf-8"), &json!("ü"))
    );
    let (status, done) = exec(&control, &id, sh("exit 3")).await;
    assert_eq!((status, &done["exit_code"]), (StatusCode::OK, &json!(3)));
    // A connection returns to the pool shortly after its answer.
    let tunnels = agent.tunnels();
    assert!(tunnels < 4, "six calls opened {tunnels} tunnels");
}

#[tokio::test]
async fn unknown_user_is_named() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let body = json!({ "cmd": "true", "user": "nonesuch" });
    let got = exec(&control, &id, body).await;
    assert_failure(&got, 400, "invalid_request", &["nonesuch"]);
    let body = json!({ "path": "/tmp", "user": "nonesuch" });
    for route in ["list", "read", "stream/read"] {
        let path = format!("/v1/sandboxes/{id}/files/{route}");
        let got = control.post(&path, body.clone()).await;
        assert_failure(&got, 400, "invalid_request", &["nonesuch"]);
    }
}

#[tokio::test]
async fn stream_is_controlled_by_the_requested_tag() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let path = format!("/v1/sandboxes/{id}/exec/stream");
    let mut socket = Socket::open(&control, &path).await;
    socket
        .send(json!({ "type": "start", "cmd": "sleep", "args": ["1000"], "tag": "job" }))
        .await;
    socket.expect("start").await;
    let (status, _) = control
        .delete(&format!("/v1/sandboxes/{id}/processes/job"))
        .await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    socket.expect("exit").await;
    for (field, value) in [("tag", json!("no tag")), ("arg", json!(["-c"]))] {
        let mut socket = Socket::open(&control, &path).await;
        socket
            .send(json!({ "type": "start", "cmd": "sleep", field: value }))
            .await;
        let error = socket.expect("error").await;
        let text = error["data"].as_str().unwrap();
        assert!(error["fatal"] == true && text.contains(field), "{error}");
    }
}

#[tokio::test]
async fn oversized_message_is_reported() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let mut socket = Socket::open(&control, &format!("/v1/sandboxes/{id}/exec/stream")).await;
    socket
        .send(json!({ "type": "start", "cmd": "sleep", "args": ["1000"], "stdin": true }))
        .await;
    socket.expect("start").await;
    let data = "A".repeat(4 * 1024 * 1024);
    socket.send(json!({ "type": "stdin", "data": data })).await;
    let error = socket.expect("error").await;
    let text = error["data"].as_str().unwrap();
    assert!(error["fatal"] == false && text.contains("bytes"), "{error}");
    socket.send(json!({ "type": "stop" })).await;
    socket.expect("exit").await;
}

#[tokio::test]
async fn guest_error_of_a_command_reaches_the_client() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let got = exec(&control, &id, json!({ "cmd": "nonesuch" })).await;
    assert_failure(&got, 400, "invalid_request", &["nonesuch", "No such file"]);
    assert_eq!(got.1["error"]["details"], json!({ "exit_code": 127 }));
    let mut body = json!({ "cmd": "/etc/passwd", "background": true });
    let got = exec(&control, &id, body.clone()).await;
    assert_failure(&got, 400, "invalid_request", &["/etc/passwd"]);
    assert_eq!(got.1["error"]["details"], json!({ "exit_code": 126 }));
    for (user, cwd, cause) in [
        ("root", "/no/such", "cwd '/no/such' does not exist"),
        ("root", "/etc/passwd", "not a directory"),
        ("nobody", "/root", "cannot be entered by user 'nobody'"),
    ] {
        body = json!({ "cmd": "true", "cwd": cwd, "user": user });
        let got = exec(&control, &id, body.clone()).await;
        assert_failure(&got, 400, "invalid_request", &[cause]);
        assert_eq!(got.1["error"].get("details"), None);
        let mut socket = Socket::open(&control, &format!("/v1/sandboxes/{id}/exec/stream")).await;
        body["type"] = json!("start");
        socket.send(body).await;
        let error = socket.expect("error").await;
        assert!(error["data"].as_str().unwrap().contains(cause), "{error}");
        assert_eq!(error["code"], "invalid_request");
        assert_eq!(error.get("exit_code"), None);
    }
    // A new sandbox has no connection yet, so its calls reach the fixed answers.
    let id = control.create().await;
    for (code, status, word) in [
        (ErrorCode::InvalidArgument, 400, "invalid_request"),
        (ErrorCode::FailedPrecondition, 409, "invalid_state"),
        (ErrorCode::AlreadyExists, 409, "already_exists"),
        (ErrorCode::DataLoss, 504, "timeout"),
        (ErrorCode::ResourceExhausted, 503, "resource_exhausted"),
        (ErrorCode::Unavailable, 503, "unavailable"),
        (ErrorCode::DeadlineExceeded, 504, "timeout"),
        (ErrorCode::Internal, 502, "agent_error"),
    ] {
        agent.answer(Some(refusal(code, "the agent's message")));
        let got = exec(&control, &id, json!({ "cmd": "echo" })).await;
        assert_failure(&got, status, word, &["the agent's message"]);
    }
    // A guest that does not speak HTTP, or that closes the connection too early.
    let torn = &refusal(ErrorCode::Internal, "never complete")[..150];
    for garbage in [&b"\0garbage\r\n\r\n"[..], torn, b""] {
        agent.answer(Some(garbage.to_vec()));
        let got = exec(&control, &id, json!({ "cmd": "echo" })).await;
        assert_failure(&got, 503, "unavailable", &[]);
    }
    agent.answer(None);
    // The host's agent disconnects.
    agent.drop_replies(TUNNEL, 1);
    let got = exec(&control, &id, json!({ "cmd": "echo" })).await;
    assert_failure(&got, 503, "unavailable", &["does not answer"]);
    assert_eq!(
        exec(&control, &id, json!({ "cmd": "echo" })).await.0,
        StatusCode::OK
    );
}

#[tokio::test]
async fn command_ends_with_its_own_process_in_each_call() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    // The child holds both pipes.
    let script = "sleep 1000 & echo $!; exit 3";
    let (status, done) = exec(&control, &id, sh(script)).await;
    assert_eq!((status, &done["exit_code"]), (StatusCode::OK, &json!(3)));
    let mut children = vec![done["stdout"].as_str().unwrap().to_owned()];
    for path in ["exec/stream", "pty?output=base64"] {
        let mut socket = Socket::open(&control, &format!("/v1/sandboxes/{id}/{path}")).await;
        let script = format!("trap '' HUP; {script}");
        socket
            .send(json!({ "type": "start", "cmd": "sh", "args": ["-c", script] }))
            .await;
        let told = socket.rest().await;
        let exit = told.last().unwrap();
        assert_eq!(
            (&exit["type"], &exit["exit_code"]),
            (&json!("exit"), &json!(3))
        );
        let output = told[1]["data"].as_str().unwrap();
        children.push(match path {
            "pty?output=base64" => String::from_utf8(BASE64.decode(output).unwrap()).unwrap(),
            _ => output.to_owned(),
        });
    }
    for child in children {
        let child = child.trim();
        let alive = std::path::Path::new("/proc").join(child).exists();
        assert!(alive, "{child} lives on");
        let killed = std::process::Command::new("kill")
            .args(["-9", child])
            .status();
        assert!(killed.unwrap().success());
    }
}

#[tokio::test]
async fn output_over_the_limit_is_cut_and_marked_with_the_exit_code() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let limit = 16 * 1024 * 1024;
    // The limit is in the middle of a character.
    let script = format!("printf a; yes ü | tr -d '\\n' | head -c {limit}; echo err >&2; exit 4");
    let (status, done) = exec(&control, &id, sh(&script)).await;
    assert_eq!((status, &done["exit_code"]), (StatusCode::OK, &json!(4)));
    assert_eq!(
        (&done["encoding"], &done["stderr"]),
        (&json!("utf-8"), &json!("err\n"))
    );
    assert_eq!(done["stdout"].as_str().unwrap().len(), limit - 1);
    let truncated = json!({
        "limit": "exec",
        "limit_bytes": limit, "stdout_dropped_bytes": 2, "stderr_dropped_bytes": 0
    });
    assert_eq!(done["truncated"], truncated);
    let (_, done) = exec(&control, &id, sh("echo short")).await;
    assert_eq!(done.get("truncated"), None);
}

#[tokio::test]
async fn dropped_output_of_a_background_process_is_marked() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    for (script, first) in [("printf short", None), ("seq 100000", Some("error"))] {
        let mut body = sh(script);
        body["background"] = json!(true);
        let (_, made) = exec(&control, &id, body).await;
        let processes = format!("/v1/sandboxes/{id}/processes");
        until("the process has ended", async || {
            let (_, list) = control.get(&processes).await;
            (list == json!({ "processes": [] })).then_some(())
        })
        .await;
        let path = format!("{processes}/{}/stream", made["pid"]);
        let mut socket = Socket::open(&control, &path).await;
        socket.expect("start").await;
        let told = socket.rest().await;
        let Some(kind) = first else {
            assert_eq!(told[0]["data"], "short");
            continue;
        };
        let mark = &told[0];
        assert_eq!(
            (&mark["type"], &mark["fatal"]),
            (&json!(kind), &json!(false))
        );
        assert_eq!(mark["code"], "output_lost");
        let kept = told.iter().filter(|message| message["type"] == "stdout");
        let kept: usize = kept.map(|m| m["data"].as_str().unwrap().len()).sum();
        let total: u64 = (1..=100_000_u32).map(|n| u64::from(n.ilog10()) + 2).sum();
        assert_eq!(mark["lost_bytes"], total - kept as u64);
    }
}

#[tokio::test]
async fn client_that_takes_no_output_is_disconnected_with_an_error() {
    let agent = FakeAgent::start().await;
    *agent.state.patience.lock().unwrap() = std::time::Duration::from_secs(1);
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let mut socket = Socket::open(&control, &format!("/v1/sandboxes/{id}/exec/stream")).await;
    let flood = "seq 6000000; exec sleep 1000";
    socket
        .send(json!({ "type": "start", "cmd": "sh", "args": ["-c", flood], "tag": "flood" }))
        .await;
    socket.expect("start").await;
    // The client reads nothing. The process must go on.
    until("the process is not blocked", async || {
        let (_, list) = control.get(&format!("/v1/sandboxes/{id}/processes")).await;
        let pid = &list["processes"][0]["pid"];
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        (name.trim() == "sleep").then_some(())
    })
    .await;
    let told = socket.rest().await;
    let error = told.last().unwrap();
    assert_eq!(
        (&error["type"], &error["fatal"]),
        (&json!("error"), &json!(true))
    );
    assert_eq!(error["code"], "timeout", "{error}");
    let path = format!("/v1/sandboxes/{id}/processes/flood/stream");
    let mut again = Socket::open(&control, &path).await;
    again.expect("start").await;
    assert_eq!(again.expect("error").await["code"], "output_lost");
    again.expect("stdout").await;
}

#[tokio::test]
async fn hanging_command_does_not_delay_others() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let (slow, quick) = (control.create().await, control.create().await);
    let hang = exec(
        &control,
        &slow,
        json!({ "cmd": "sleep", "args": ["1000"], "timeout_sec": 0 }),
    );
    let mut hang = std::pin::pin!(hang);
    for _ in 0..20 {
        tokio::select! {
            _ = &mut hang => panic!("the command must not end"),
            (status, _) = exec(&control, &quick, json!({ "cmd": "echo" })) => assert_eq!(status, StatusCode::OK),
        }
    }
    let (status, _) = control.delete(&format!("/v1/sandboxes/{quick}")).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn a_background_process_is_listed_followed_and_killed() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let body = json!({ "cmd": "sleep", "args": ["1000"], "background": true, "tag": "job" });
    let (status, made) = exec(&control, &id, body).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{made}");
    assert_eq!(
        (&made["tag"], &made["cmd"], &made["sandbox_id"]),
        (&json!("job"), &json!("sleep"), &json!(id))
    );
    let pid = made["pid"].as_u64().unwrap();
    let processes = format!("/v1/sandboxes/{id}/processes");
    let (_, list) = control.get(&processes).await;
    let wanted =
        json!({ "processes": [{ "pid": pid, "tag": "job", "cmd": "sleep", "args": ["1000"] }] });
    assert_eq!(list, wanted);
    let mut socket = Socket::open(&control, &format!("{processes}/job/stream")).await;
    assert_eq!(socket.expect("start").await["pid"], pid);
    let (status, _) = control
        .delete(&format!("{processes}/{pid}?signal=SIGTERM"))
        .await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let exit = socket.expect("exit").await;
    assert_eq!(
        (&exit["exit_code"], &exit["error"]),
        (&json!(-1), &json!("signal: terminated"))
    );
    assert_eq!(
        socket.next().await,
        None,
        "the server closes the connection"
    );
    let got = control.delete(&format!("{processes}/job")).await;
    assert_failure(&got, 404, "not_found", &["process"]);
    assert_eq!(control.get(&processes).await.1, json!({ "processes": [] }));
    let body = json!({ "cmd": "sleep", "args": ["1000"], "background": true });
    let (status, made) = exec(&control, &id, body).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    let tag = made["tag"].as_str().unwrap();
    assert!(tag.starts_with("proc-") && tag.len() == 29, "{tag}");
    let (status, _) = control.delete(&format!("{processes}/{tag}")).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let mut lost = Socket::open(&control, &format!("{processes}/nonesuch/stream")).await;
    assert!(
        lost.expect("error").await["data"]
            .as_str()
            .unwrap()
            .contains("nonesuch")
    );
    assert_eq!(lost.next().await, None);
}

#[tokio::test]
async fn stream_sends_start_output_and_exit() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let path = format!("/v1/sandboxes/{id}/exec/stream");
    let mut socket = Socket::open(&control, &path).await;
    socket
        .send(json!({ "type": "start", "cmd": "echo", "args": ["hi"] }))
        .await;
    let told = socket.rest().await;
    let pid = told[0]["pid"].as_u64().unwrap();
    assert_eq!(
        told,
        [
            json!({ "type": "start", "pid": pid }),
            json!({ "type": "stdout", "data": "hi\n" }),
            json!({ "type": "exit", "exit_code": 0 }),
        ]
    );
    // A character in two pieces, then a byte that is not UTF-8.
    let mut socket = Socket::open(&control, &path).await;
    socket
        .send(json!({ "type": "start", "cmd": "cat", "stdin": true }))
        .await;
    socket.expect("start").await;
    let mut outputs = Vec::new();
    for piece in [&b"a\xc3"[..], b"\xbc", b"\xff"] {
        let data = BASE64.encode(piece);
        socket.send(json!({ "type": "stdin", "data": data })).await;
        let output = socket.expect("stdout").await;
        outputs.push((output["data"].clone(), output.get("encoding").cloned()));
    }
    assert_eq!(
        outputs,
        [
            (json!("a"), None),
            (json!("ü"), None),
            (json!("/w=="), Some(json!("base64"))),
        ]
    );
    // The VM is lost in the middle of the output.
    let mut socket = Socket::open(&control, &path).await;
    socket
        .send(json!({ "type": "start", "cmd": "sh", "args": ["-c", "printf half; sleep 1000"] }))
        .await;
    socket.expect("start").await;
    socket.expect("stdout").await;
    agent.state.list_gate.shut();
    agent.change(&id, |sandbox| {
        sandbox.reason = "the machine is gone".to_owned();
        sandbox.state = SandboxState::SANDBOX_STATE_ERROR;
    });
    let error = socket.expect("error").await;
    let text = error["data"].as_str().unwrap();
    assert!(text.contains("the machine is gone"), "{error}");
    assert_eq!(socket.next().await, None);
}

#[tokio::test]
async fn stream_reports_invalid_messages() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let path = format!("/v1/sandboxes/{id}/exec/stream");
    for (first, word) in [
        (json!({ "type": "stop" }), "start"),
        (json!({ "type": "nonesuch" }), "start"),
        (json!(7), "start"),
        (json!({ "type": "start" }), "cmd"),
        (json!({ "type": "start", "cmd": "" }), "`cmd`"),
        (
            json!({ "type": "start", "cmd": "a", "timeout_sec": -1 }),
            "`timeout_sec`",
        ),
        (json!({ "type": "start", "cmd": "nonesuch" }), "nonesuch"),
    ] {
        let mut socket = Socket::open(&control, &path).await;
        socket.send(first.clone()).await;
        let error = socket.expect("error").await;
        assert!(
            error["data"].as_str().unwrap().contains(word),
            "{first}: {error}"
        );
        assert_eq!(socket.next().await, None);
    }
    // Later invalid messages do not end the session.
    let mut socket = Socket::open(&control, &path).await;
    socket
        .send(json!({ "type": "start", "cmd": "cat", "stdin": true }))
        .await;
    socket.expect("start").await;
    socket.send_text("{".to_owned()).await;
    socket.expect("error").await;
    socket.send_binary(vec![1]).await;
    socket.expect("error").await;
    socket.send(json!({ "type": "stdin", "data": "!" })).await;
    socket.expect("error").await;
    socket
        .send(json!({ "type": "stdin", "data": BASE64.encode("ok") }))
        .await;
    assert_eq!(socket.expect("stdout").await["data"], "ok");
    socket.send(json!({ "type": "close_stdin" })).await;
    assert_eq!(socket.expect("exit").await["exit_code"], 0);
}

#[tokio::test]
async fn stop_sends_sigterm_before_sigkill() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let mut socket = Socket::open(&control, &format!("/v1/sandboxes/{id}/exec/stream")).await;
    let start = json!({ "type": "start", "cmd": "sleep", "args": ["1000"] });
    socket.send(start).await;
    socket.expect("start").await;
    socket.send(json!({ "type": "stop" })).await;
    assert_eq!(socket.expect("exit").await["error"], "signal: terminated");
    assert_eq!(socket.next().await, None);
}

#[tokio::test]
async fn large_output_is_complete_and_a_slow_client_applies_back_pressure() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let length = 50_000_000_usize;
    let mut socket = Socket::open(&control, &format!("/v1/sandboxes/{id}/exec/stream")).await;
    let flood = format!("head -c {length} /dev/zero | tr '\\0' x");
    socket
        .send(json!({ "type": "start", "cmd": "sh", "args": ["-c", flood] }))
        .await;
    socket.expect("start").await;
    let flooded = || {
        agent
            .state
            .download_bytes
            .load(std::sync::atomic::Ordering::SeqCst)
    };
    // The client reads nothing: the output must stop long before its end.
    let stood = until("the output stops", async || {
        let before = flooded();
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        (before > 0 && before == flooded()).then_some(before)
    })
    .await;
    assert!(stood < length, "{stood} bytes are buffered");
    let mut got = 0;
    loop {
        let message = socket.next().await.unwrap();
        if message["type"] == "exit" {
            break;
        }
        let data = message["data"].as_str().unwrap();
        assert!(data.bytes().all(|b| b == b'x'));
        got += data.len();
    }
    assert_eq!(got, length);
}

#[tokio::test]
async fn metrics_history_survives_a_pause() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let path = format!("/v1/sandboxes/{id}/metrics");
    let (status, now) = control.get(&path).await;
    assert_eq!(status, StatusCode::OK, "{now}");
    let point = &now["points"][0];
    for field in ["timestamp_unix", "cpu_pct", "mem_bytes", "disk_bytes"] {
        assert_eq!(point[field], now[field], "{now}");
    }
    for range in ["5m", "10m", "1h", "2h", "6h", "12h", "24h"] {
        let (status, got) = control.get(&format!("{path}?range={range}")).await;
        assert_eq!(status, StatusCode::OK, "{range}: {got}");
    }
    for query in ["range=7m", "range=", "rnage=5m"] {
        let got = control.get(&format!("{path}?{query}")).await;
        assert_failure(&got, 400, "invalid_request", &["range"]);
    }
    let pause = format!("/v1/sandboxes/{id}/pause");
    assert_eq!(control.post(&pause, json!({})).await.0, StatusCode::OK);
    let (status, before) = control.get(&path).await;
    assert_eq!(status, StatusCode::OK, "{before}");
    assert_eq!(before["mem_bytes"], now["mem_bytes"]);
    assert_eq!(
        control.status(&id).await,
        "paused",
        "metrics must not resume the sandbox"
    );
    control.delete(&format!("/v1/sandboxes/{id}")).await;
    let got = control.get(&path).await;
    assert_failure(&got, 404, "not_found", &["stopped"]);
}
