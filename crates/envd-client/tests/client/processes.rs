//! Processes: complete, bounded, at the pace of the slower side, and with the guest's own errors.

use std::time::{Duration, Instant};

use connectrpc::ErrorCode;
use wrenn_envd_client::{EnvdClient, Exec, exit_code};
use wrenn_model::limits::MAX_EXEC_OUTPUT_BYTES;
use wrenn_proto::rpc::process::{
    ProcessConfig, ProcessInput, ProcessSelector, Signal, StartRequest,
    process_event::{Event, data_event::Output},
    process_input::Input,
    process_selector::Selector,
};

use crate::support::{Guest, TOKEN, peak_memory_kib, sh, stub, until};

fn tag(name: &str) -> ProcessSelector {
    ProcessSelector {
        selector: Some(Selector::Tag(name.to_owned())),
        ..Default::default()
    }
}

fn start(cmd: &str, args: &[&str]) -> StartRequest {
    StartRequest {
        process: ProcessConfig {
            cmd: cmd.to_owned(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Default::default()
        }
        .into(),
        tag: Some("job".to_owned()),
        ..Default::default()
    }
}

/// True if a process runs and is not a zombie.
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

#[tokio::test]
async fn short_commands_never_lose_their_output() {
    let guest = Guest::start().await;
    for n in 0..200 {
        let done = guest.sh(&format!("echo {n}")).await.unwrap();
        assert_eq!(
            (done.stdout, done.exit_code),
            (format!("{n}\n").into_bytes(), 0)
        );
    }
}

#[tokio::test]
async fn commands_one_after_another_share_a_connection() {
    let guest = Guest::start().await;
    for _ in 0..20 {
        guest.sh("echo").await.unwrap();
        guest.client.processes().await.unwrap();
        // A connection returns to the pool shortly after its answer.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(
        guest.dials() < 20,
        "40 calls opened {} connections",
        guest.dials()
    );
}

#[tokio::test]
async fn output_to_a_slow_reader_is_complete_and_does_not_accumulate() {
    let guest = Guest::start().await;
    let before = peak_memory_kib();
    let request = start("seq", &["1", "6500000"]);
    let mut events = guest.client.start(request, "", None, false).await.unwrap();
    let (mut pending, mut expected, mut length, mut code) = (Vec::new(), 1, 0, None);
    while let Some(event) = events.next().await.unwrap() {
        match event.event {
            Some(Event::Data(data)) => {
                let Some(Output::Stdout(bytes)) = data.output else {
                    panic!("not stdout")
                };
                length += bytes.len();
                pending.extend_from_slice(&bytes);
                let end = pending.iter().rposition(|byte| *byte == b'\n');
                let lines: Vec<u8> = pending.drain(..end.map_or(0, |end| end + 1)).collect();
                for line in String::from_utf8(lines).unwrap().lines() {
                    assert_eq!(line.parse(), Ok(expected));
                    expected += 1;
                }
                if length % 97 == 0 {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            Some(Event::End(end)) => code = Some(end.exit_code),
            _ => {}
        }
    }
    assert_eq!((expected, code), (6_500_001, Some(0)));
    assert!(length > 50_000_000 && pending.is_empty());
    let grown = peak_memory_kib() - before;
    assert!(grown < 32 * 1024, "memory grew by {grown} KiB");
}

#[tokio::test]
async fn collected_output_is_bounded_and_the_rest_is_counted() {
    let guest = Guest::start().await;
    let fits = format!("head -c {MAX_EXEC_OUTPUT_BYTES} /dev/zero");
    let done = guest.sh(&fits).await.unwrap();
    assert_eq!(
        (done.stdout.len(), done.stdout_dropped_bytes),
        (MAX_EXEC_OUTPUT_BYTES, 0)
    );
    let more = MAX_EXEC_OUTPUT_BYTES + 100_000;
    let script = format!("echo out; printf first >&2; head -c {more} /dev/zero >&2; exit 3");
    let done = guest.sh(&script).await.unwrap();
    assert_eq!((done.exit_code, done.stdout.as_slice()), (3, &b"out\n"[..]));
    assert_eq!(
        (done.stderr.len(), done.stderr_dropped_bytes),
        (MAX_EXEC_OUTPUT_BYTES, 100_005)
    );
    assert_eq!(
        (&done.stderr[..5], done.stdout_dropped_bytes),
        (&b"first"[..], 0)
    );
}

#[tokio::test]
async fn a_command_ends_when_its_own_process_does() {
    let guest = Guest::start().await;
    let begun = Instant::now();
    // The child holds both pipes, in a session of its own.
    let script = "setsid sleep 1000 & echo $!; head -c 3000000 /dev/zero; echo last >&2; exit 4";
    let done = guest.sh(script).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "it waits");
    assert_eq!(
        (done.exit_code, done.stderr.as_slice()),
        (4, &b"last\n"[..])
    );
    let line = done.stdout.iter().position(|byte| *byte == b'\n').unwrap();
    assert_eq!(done.stdout.len(), line + 1 + 3_000_000);
    let child = std::str::from_utf8(&done.stdout[..line]).unwrap();
    assert!(runs(child), "the child lives on");
    let killed = std::process::Command::new("kill")
        .args(["-9", child])
        .status();
    assert!(killed.unwrap().success());
}

#[tokio::test]
async fn without_cgroups_a_time_limit_also_ends_descendants_with_their_own_session() {
    let guest = Guest::start().await;
    let pids = guest.path("pids");
    let script = format!(
        "setsid sleep 1000 & echo $! >> {pids}
         setsid sh -c 'sleep 1000 & echo $! >> {pids}; wait' &
         wait"
    );
    let exec = Exec {
        time_limit: Some(Duration::from_secs(2)),
        ..sh(&script)
    };
    let done = guest.client.exec(exec).await.unwrap();
    assert_eq!(done.error, "timed out after 2 s: signal: killed");
    let pids = std::fs::read_to_string(pids).unwrap();
    assert_eq!(pids.lines().count(), 2, "{pids}");
    for pid in pids.lines() {
        until("the descendant is killed", async || !runs(pid)).await;
    }
}

#[tokio::test]
async fn a_time_limit_ends_the_command_and_is_reported() {
    let guest = Guest::start().await;
    let exec = Exec {
        time_limit: Some(Duration::from_secs(1)),
        ..sh("exec sleep 1000")
    };
    let done = guest.client.exec(exec).await.unwrap();
    assert_eq!(
        (done.exit_code, done.error.as_str()),
        (-1, "timed out after 1 s: signal: killed")
    );
    let done = guest.sh("exit 3").await.unwrap();
    assert_eq!((done.exit_code, done.error.as_str()), (3, ""));
    let done = guest.sh("kill -9 $$").await.unwrap();
    assert_eq!(
        (done.exit_code, done.error.as_str()),
        (-1, "signal: killed")
    );
}

#[tokio::test]
async fn the_guests_errors_keep_their_codes() {
    let guest = Guest::start().await;
    let client = &guest.client;
    let code = async |exec: Exec| client.exec(exec).await.expect_err("rejected");
    let as_user = |user: &str| Exec {
        user: user.to_owned(),
        ..sh("true")
    };
    let mut unknown_program = sh("true");
    unknown_program.process.cmd = "/no/such/program".to_owned();
    let error = code(unknown_program).await;
    assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
    assert_eq!(exit_code(&error), Some(127));
    let mut not_executable = sh("true");
    not_executable.process.cmd = "/etc/passwd".to_owned();
    let error = code(not_executable).await;
    assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
    assert_eq!(exit_code(&error), Some(126));
    let error = code(as_user("a:b")).await;
    assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
    let error = code(as_user("no-such-user")).await;
    assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
    assert!(error.to_string().contains("no-such-user"), "{error}");
    assert_eq!(exit_code(&error), None);
    for (user, cwd, cause) in [
        ("", "/no/such", "does not exist"),
        ("", "/etc/passwd", "not a directory"),
        ("nobody", "/root", "cannot be entered by user 'nobody'"),
    ] {
        let mut exec = as_user(user);
        exec.process.cwd = Some(cwd.to_owned());
        let error = code(exec).await;
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
        assert!(error.to_string().contains(cause), "{error}");
    }
    let error = match client.connect(tag("none")).await {
        Ok(mut events) => events.next().await.expect_err("no such process"),
        Err(error) => error,
    };
    assert_eq!(error.code, ErrorCode::NotFound, "{error}");
    let error = client.signal(tag("none"), Signal::SIGNAL_SIGKILL).await;
    assert_eq!(error.expect_err("none").code, ErrorCode::NotFound);
    let intruder = client.showing("wrong").unwrap();
    let error = intruder.metrics().await.expect_err("rejected");
    assert_eq!(error.code, ErrorCode::Internal, "{error}");
}

#[tokio::test]
async fn processes_are_listed_fed_resized_and_killed() {
    let guest = Guest::start().await;
    let client = &guest.client;
    let mut events = client
        .start(start("cat", &[]), "root", None, false)
        .await
        .unwrap();
    let listed = client.processes().await.unwrap();
    assert_eq!(listed[0].tag.as_deref(), Some("job"));
    let input = ProcessInput {
        input: Some(Input::Stdin(b"fed".to_vec())),
        ..Default::default()
    };
    client.send_input(tag("job"), input).await.unwrap();
    client.close_stdin(tag("job")).await.unwrap();
    let mut received = Vec::new();
    while let Some(event) = events.next().await.unwrap() {
        if let Some(Event::Data(data)) = event.event
            && let Some(Output::Stdout(bytes)) = data.output
        {
            received.extend(bytes);
        }
    }
    assert_eq!(received, b"fed");
    // A process without a terminal has no size; one that is not followed still runs.
    let request = start("sleep", &["1000"]);
    drop(client.start(request, "", None, true).await.unwrap());
    client
        .resize(tag("job"), 100, 30)
        .await
        .expect_err("no tty");
    client
        .signal(tag("job"), Signal::SIGNAL_SIGTERM)
        .await
        .unwrap();
    until("the process has ended", async || {
        client.processes().await.unwrap().is_empty()
    })
    .await;
}

#[tokio::test]
async fn commands_that_hang_delay_no_other() {
    let guest = Guest::start().await;
    let hanging: Vec<_> = (0..50)
        .map(|_| {
            let client = guest.client.clone();
            tokio::spawn(async move { client.exec(sh("exec sleep 1000")).await })
        })
        .collect();
    until("fifty commands run", async || {
        guest.client.processes().await.unwrap().len() == 50
    })
    .await;
    for n in 0..20 {
        let script = format!("echo {n}");
        let run = guest.sh(&script);
        let done = tokio::time::timeout(Duration::from_secs(20), run).await;
        assert_eq!(done.unwrap().unwrap().stdout, format!("{n}\n").into_bytes());
    }
    for call in hanging {
        call.abort();
    }
}

#[tokio::test]
async fn a_guest_that_disconnects_is_unavailable_with_a_source() {
    for answer in [
        &b""[..],
        b"\0\xffgarbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/connect+proto\r\nContent-Length: 100\r\n\r\n\0\0",
    ] {
        let client = stub(answer).await;
        let error = client.exec(sh("true")).await.expect_err("broken");
        assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
        assert!(std::error::Error::source(&error).is_some(), "{error}");
    }
    let nothing = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = nothing.local_addr().unwrap();
    drop(nothing);
    let client = EnvdClient::over_tcp(address, TOKEN).unwrap();
    assert!(!client.is_healthy().await);
    let error = client.processes().await.expect_err("nothing listens");
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    assert!(error.to_string().contains("failed to connect"), "{error}");
}

#[tokio::test]
async fn a_default_user_that_was_removed_is_named() {
    let guest = Guest::start_as("was-removed").await;
    let error = guest.sh("true").await.expect_err("rejected");
    assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
    assert!(error.to_string().contains("was-removed"), "{error}");
    let error = guest.client.make_dir("/tmp/x", "").await;
    let error = error.expect_err("rejected");
    assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
    let error = guest.client.download("/etc/passwd", "").await;
    let error = error.map(drop).expect_err("rejected");
    assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
    assert!(error.to_string().contains("was-removed"), "{error}");
}
