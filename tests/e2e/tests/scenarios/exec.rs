//! Commands: output is complete to the byte, and commands end as specified.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use reqwest::{Method, StatusCode};
use serde_json::json;
use wrenn_e2e::{
    Service, rounds,
    wait::{GENEROUS, until},
    ws::Socket,
};
use wrenn_proto::guest::SETTLED;

#[tokio::test]
async fn a_short_output_is_never_lost() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    for round in 0..rounds(2000) {
        let line = format!("x{round}");
        let output = sandbox.exec("echo", &[&line]).await?;
        assert_eq!((output.code, output.stdout), (0, format!("{line}\n")));
    }
    sandbox.destroy().await
}

#[tokio::test]
async fn fifty_megabytes_reach_a_slow_reader_to_the_byte() -> Result<()> {
    const BYTES: usize = 50 * 1024 * 1024;
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    let mut socket = Socket::open(&service, &sandbox.path("/exec/stream")).await?;
    let command = format!("yes 0123456789abcde | head -c {BYTES}");
    socket
        .send(&json!({ "type": "start", "cmd": "sh", "args": ["-c", command], "timeout_sec": 0 }))
        .await?;
    let pattern = b"0123456789abcde\n";
    let (mut received, mut messages) = (0, 0);
    let exit = loop {
        let message = socket.next().await?.context("no exit message")?;
        match message["type"].as_str().unwrap_or_default() {
            "stdout" => {
                let data = message["data"].as_str().unwrap_or_default().as_bytes();
                for (i, &byte) in data.iter().enumerate() {
                    assert_eq!(
                        byte,
                        pattern[(received + i) % pattern.len()],
                        "at {}",
                        received + i
                    );
                }
                received += data.len();
                messages += 1;
                if messages % 100 == 0 {
                    // Slow reader: the guest must wait and must not lose data.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            "exit" => break message,
            "start" => {}
            other => panic!("{other}: {message}"),
        }
    };
    assert_eq!(exit["exit_code"], 0);
    assert_eq!(received, BYTES);
    sandbox.destroy().await
}

#[tokio::test]
async fn command_gets_arguments_environment_directory_and_user() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    let output = sandbox
        .exec_with(json!({
            "cmd": "sh", "args": ["-c", "printf '%s|' \"$1\" \"$A\" \"$PWD\" \"$(id -un)\" \"$(id -G)\"; echo err >&2; exit 7", "-", "a b"],
            "envs": { "A": "ü" }, "cwd": "/usr", "user": "user"
        }))
        .await?;
    assert_eq!(output.code, 7);
    assert_eq!(output.stderr, "err\n");
    let parts: Vec<_> = output.stdout.split('|').collect();
    assert_eq!(parts[..4], ["a b", "ü", "/usr", "user"], "{output:?}");
    assert!(
        !parts[4].split(' ').any(|gid| gid == "0"),
        "in root's groups: {output:?}"
    );

    let binary = service
        .json(
            Method::POST,
            &sandbox.path("/exec"),
            &json!({ "cmd": "printf", "args": ["\\377"] }),
        )
        .await?
        .1;
    assert_eq!(
        (binary["encoding"].as_str(), binary["stdout"].as_str()),
        (Some("base64"), Some("/w=="))
    );
    sandbox.destroy().await
}

#[tokio::test]
async fn a_command_that_takes_too_long_is_killed_in_the_guest() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    let begun = Instant::now();
    let (status, body) = service
        .json(
            Method::POST,
            &sandbox.path("/exec"),
            &json!({ "cmd": "sleep", "args": ["1000"], "timeout_sec": 2 }),
        )
        .await?;
    assert!(begun.elapsed() < GENEROUS, "{status} {body}");
    assert_eq!(
        (status, &body["error"]["message"]),
        (
            StatusCode::GATEWAY_TIMEOUT,
            &json!("`sleep` timed out after 2 s: signal: killed")
        )
    );
    let mut socket = Socket::open(&service, &sandbox.path("/exec/stream")).await?;
    socket
        .send(&json!({ "type": "start", "cmd": "sleep", "args": ["1000"], "timeout_sec": 1 }))
        .await?;
    let exit = socket.next_of("exit").await?;
    assert_eq!(exit["error"], "timed out: signal: killed", "{exit}");
    until("the command is gone", GENEROUS, async || {
        Ok((sandbox.shell("pgrep -x sleep").await?.code == 1).then_some(()))
    })
    .await?;
    sandbox.destroy().await
}

/// A foreground command may leave a server behind, and a time limit leaves nothing.
#[tokio::test]
async fn a_command_ends_with_its_own_process_and_a_time_limit_ends_all() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    let begun = Instant::now();
    let output = sandbox.shell("sleep 1001 & echo $!; exit 3").await?;
    assert!(begun.elapsed() < GENEROUS, "{output:?}");
    assert_eq!(output.code, 3, "{output:?}");
    let child = output.stdout.trim().to_owned();
    let mut socket = Socket::open(&service, &sandbox.path("/exec/stream")).await?;
    socket
        .send(&json!({ "type": "start", "cmd": "sh", "args": ["-c", "sleep 1001 & exit 4"] }))
        .await?;
    assert_eq!(socket.next_of("exit").await?["exit_code"], 4);
    let mut terminal = Socket::open(&service, &sandbox.path("/pty")).await?;
    terminal
        .send(
            &json!({ "type": "start", "cmd": "sh", "args": ["-c", "setsid sleep 1001 & exit 5"] }),
        )
        .await?;
    assert_eq!(terminal.next_of("exit").await?["exit_code"], 5);
    let alive = sandbox.shell(&format!("kill -0 {child}")).await?;
    assert_eq!(alive.code, 0, "{alive:?}");

    let script = "(setsid sh -c 'exec sleep 1002' &); setsid sleep 1002 & sleep 1002";
    let body = json!({ "cmd": "sh", "args": ["-c", script], "timeout_sec": 3 });
    let (status, reply) = service
        .json(Method::POST, &sandbox.path("/exec"), &body)
        .await?;
    assert_eq!(
        (status, &reply["error"]["message"]),
        (
            StatusCode::GATEWAY_TIMEOUT,
            &json!("`sh` timed out after 3 s: signal: killed")
        )
    );
    until("all descendants are gone", GENEROUS, async || {
        let found = sandbox.exec("pgrep", &["-fx", "sleep 1002"]).await?;
        Ok((found.code == 1).then_some(()))
    })
    .await?;
    sandbox.destroy().await
}

#[tokio::test]
async fn a_command_that_cannot_run_has_its_reason() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    let cases = [
        (json!({ "cmd": "nonesuch" }), "nonesuch", json!(127)),
        (json!({ "cmd": "/etc/passwd" }), "/etc/passwd", json!(126)),
        (
            json!({ "cmd": "true", "user": "nobody2" }),
            "nobody2",
            json!(null),
        ),
        (
            json!({ "cmd": "true", "cwd": "/no/such" }),
            "does not exist",
            json!(null),
        ),
        (
            json!({ "cmd": "true", "cwd": "/etc/passwd" }),
            "not a directory",
            json!(null),
        ),
        (
            json!({ "cmd": "true", "cwd": "/root", "user": "user" }),
            "cannot be entered by user 'user'",
            json!(null),
        ),
    ];
    for (body, cause, exit_code) in cases {
        let (status, reply) = service
            .json(Method::POST, &sandbox.path("/exec"), &body)
            .await?;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}: {reply}");
        let message = reply["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains(cause), "{body}: {reply}");
        assert_eq!(reply["error"]["details"]["exit_code"], exit_code, "{reply}");
    }
    // A value of the kernel has no owner.
    sandbox.write("/proc/sys/vm/swappiness", "17\n").await?;
    assert_eq!(sandbox.read("/proc/sys/vm/swappiness").await?, b"17\n");
    sandbox.destroy().await
}

#[tokio::test]
async fn a_background_process_is_listed_followed_and_killed() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    let body = json!({
        "cmd": "sh", "args": ["-c", "echo first; while :; do echo tick; sleep 0.2; done"], "background": true, "tag": "clock"
    });
    let (status, started) = service
        .json(Method::POST, &sandbox.path("/exec"), &body)
        .await?;
    assert_eq!(status, StatusCode::ACCEPTED, "{started}");
    assert_eq!(started["tag"], "clock");

    let (_, list) = service.get(&sandbox.path("/processes")).await?;
    assert_eq!(list["processes"][0]["pid"], started["pid"], "{list}");
    let mut follow = Socket::open(&service, &sandbox.path("/processes/clock/stream")).await?;
    // Output starts with the first line, which was printed before a client connected. Several lines
    // may arrive in one message.
    let told = follow.next_of("stdout").await?;
    let data = told["data"].as_str().unwrap_or_default();
    assert!(data.starts_with("first\n"), "{told}");

    let (status, _) = service
        .json(
            Method::DELETE,
            &sandbox.path("/processes/clock?signal=SIGKILL"),
            &json!({}),
        )
        .await?;
    assert_eq!(status, StatusCode::NO_CONTENT);
    follow.next_of("exit").await?;
    let (_, list) = service.get(&sandbox.path("/processes")).await?;
    assert_eq!(list["processes"], json!([]));
    let (status, _) = service
        .json(
            Method::DELETE,
            &sandbox.path("/processes/clock"),
            &json!({}),
        )
        .await?;
    assert_eq!(status, StatusCode::NOT_FOUND);
    sandbox.destroy().await
}

#[tokio::test]
async fn foreground_command_is_found_by_its_tag() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    let body = json!({ "cmd": "sleep", "args": ["300"], "tag": "nap", "timeout_sec": 0 });
    let path = sandbox.path("/exec");
    let waiting = service.json(Method::POST, &path, &body);
    let killing = async {
        until("the command is listed", GENEROUS, async || {
            let (_, list) = service.get(&sandbox.path("/processes")).await?;
            Ok((list["processes"][0]["tag"] == "nap").then_some(()))
        })
        .await?;
        let process = sandbox.path("/processes/nap");
        service.json(Method::DELETE, &process, &json!({})).await
    };
    let (ended, killed) = tokio::try_join!(waiting, killing)?;
    assert_eq!(killed.0, StatusCode::NO_CONTENT, "{killed:?}");
    assert_eq!(ended.1["error"], "signal: killed", "{ended:?}");
    sandbox.destroy().await
}

#[tokio::test]
async fn a_terminal_survives_its_client_and_a_burst_of_input() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    let path = sandbox.path("/pty?output=base64");
    let mut terminal = Socket::open(&service, &path).await?;
    terminal
        .send(&json!({ "type": "start", "cmd": "/bin/sh", "cols": 80, "rows": 24 }))
        .await?;
    let started = terminal.next_of("started").await?;
    drop(terminal);

    let mut again = Socket::open(&service, &path).await?;
    again
        .send(&json!({ "type": "connect", "tag": started["tag"] }))
        .await?;
    again
        .send(&json!({ "type": "resize", "cols": 101, "rows": 33 }))
        .await?;
    // "stty size; echo $((6*7))" in base64. The result differs from the echoed input.
    again
        .send(&json!({ "type": "input", "data": "c3R0eSBzaXplOyBlY2hvICQoKDYqNykpCg==" }))
        .await?;
    let mut seen = String::new();
    while !(seen.contains("33 101") && seen.contains("42")) {
        let output = again.next_of("output").await?;
        seen.push_str(&decode(output["data"].as_str().unwrap_or_default()));
    }
    for _ in 0..200 {
        again
            .send(&json!({ "type": "input", "data": "eA==" }))
            .await?;
    }
    again.send(&json!({ "type": "kill" })).await?;
    again.next_of("exit").await?;
    sandbox.destroy().await
}

/// Decodes base64 (standard alphabet), as far as the test needs it.
pub(crate) fn decode(text: &str) -> String {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for symbol in text.bytes().filter(|&b| b != b'=') {
        let value = ALPHABET.iter().position(|&a| a == symbol).unwrap_or(0);
        bits = bits << 6 | u32::try_from(value).unwrap_or(0);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn a_hung_command_does_not_slow_another_sandbox() -> Result<()> {
    let service = Service::start().await?;
    let hung = service.create().await?;
    let other = service.create().await?;
    let stuck = hung.exec_with(json!({ "cmd": "sleep", "args": ["1000"], "timeout_sec": 0 }));
    let quick = async {
        for _ in 0..20 {
            let begun = Instant::now();
            assert_eq!(other.exec("true", &[]).await?.code, 0);
            assert!(begun.elapsed() < GENEROUS);
        }
        anyhow::Ok(())
    };
    tokio::select! {
        output = stuck => panic!("the hung command ended: {output:?}"),
        done = quick => done?,
    }
    hung.destroy().await?;
    other.destroy().await
}

/// A guest with a periodic tick would cause 250 interrupts per second, each at the host's cost.
#[tokio::test]
async fn idle_guest_uses_no_processor_time() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    // Measured after all automatic work of a boot is complete. The time is the guest's own, because
    // it may be longer than the sleep.
    let look = r"awk '/^ *LOC:/ {print $2}' /proc/interrupts; cut -d ' ' -f 1 /proc/uptime";
    let command = format!("until [ -e {SETTLED} ]; do sleep 0.1; done; {look}; sleep 4; {look}");
    let output = sandbox.shell(&command).await?;
    let seen: Vec<f64> = output
        .stdout
        .lines()
        .map(str::parse::<f64>)
        .collect::<Result<_, _>>()?;
    let (interrupts, seconds) = (seen[2] - seen[0], seen[3] - seen[1]);
    assert!(
        interrupts < seconds * 125.0,
        "{interrupts} timer interrupts in {seconds} s"
    );
    sandbox.destroy().await
}
