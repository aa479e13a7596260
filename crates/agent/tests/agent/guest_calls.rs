//! Processes and files in the guest, accessed through the agent: complete, bounded, at the pace of
//! the slower side, and with the guest's own errors.

use std::{fs, path::PathBuf, time::Duration};

use connectrpc::ErrorCode;
use futures::StreamExt as _;
use sha2::{Digest as _, Sha256};
use wrenn_model::limits::{FILE_CHUNK_BYTES, MAX_EXEC_OUTPUT_BYTES};
use wrenn_proto::rpc::{
    hostagent::v1::{self as pb, __buffa::oneof::write_file_stream_request::Part},
    process::{
        self as guest,
        __buffa::oneof::{
            process_event::{Event, data_event::Output},
            process_selector::Selector,
        },
    },
};

use crate::agent::{self, TestAgent, exec_request, meta, on_private_host};

const ID: &str = "sb-guest";

/// Runs a test with one running sandbox.
fn with_sandbox(test: impl AsyncFnOnce(&TestAgent)) {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        test(&agent).await;
        agent.destroy(ID).await.expect("destroyed");
        agent.stop().await;
    });
}

/// Path of a file "in the guest", which is on the host.
fn path(agent: &TestAgent, name: &str) -> String {
    agent.data_dir.join(name).to_str().expect("text").to_owned()
}

fn calls(agent: &TestAgent) -> String {
    fs::read_to_string(agent.sandbox_dir(ID).join("calls.log")).expect("calls")
}

/// Peak memory of this process, which contains the agent and the client, in KiB.
fn peak_memory_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:"))
        .expect("VmHWM");
    line.trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("a number")
}

fn stream_request(script: &str) -> pb::ExecStreamRequest {
    let exec = exec_request(ID, "sh", &["-c", script]);
    pb::ExecStreamRequest {
        id: ID.to_owned(),
        start: guest::StartRequest {
            process: exec.process,
            ..Default::default()
        }
        .into(),
        ..Default::default()
    }
}

#[test]
fn short_commands_never_lose_their_output() {
    with_sandbox(async |agent| {
        for n in 0..200 {
            let done = agent.sh(ID, &format!("echo {n}")).await.expect("run");
            assert_eq!(
                (done.stdout, done.exit_code),
                (format!("{n}\n").into_bytes(), 0)
            );
        }
    });
}

#[test]
fn much_output_to_a_slow_reader_is_whole_and_does_not_pile_up() {
    with_sandbox(async |agent| {
        let before = peak_memory_kib();
        let request = stream_request("seq 1 6500000");
        let mut events = agent.client.exec_stream(request).await.expect("started");
        let (mut hash, mut length, mut started, mut code) = (Sha256::new(), 0, false, None);
        while let Some(message) = events.message().await.expect("an event") {
            match &message.to_owned_message().event.event {
                Some(Event::Start(start)) => started = start.pid > 0,
                Some(Event::Data(data)) => {
                    let Some(Output::Stdout(bytes)) = &data.output else {
                        panic!("not stdout")
                    };
                    length += bytes.len();
                    hash.update(bytes);
                    if length % 97 == 0 {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
                Some(Event::End(end)) => code = Some(end.exit_code),
                _ => {}
            }
        }
        assert!(started && length > 50_000_000);
        assert_eq!(code, Some(0));
        let mut expected = Sha256::new();
        for n in 1..=6_500_000 {
            expected.update(format!("{n}\n"));
        }
        assert_eq!(hash.finalize(), expected.finalize());
        let grown = peak_memory_kib() - before;
        assert!(grown < 32 * 1024, "memory grew by {grown} KiB");
    });
}

#[test]
fn collected_output_is_bounded_and_its_command_is_killed() {
    with_sandbox(async |agent| {
        let fits = format!("head -c {MAX_EXEC_OUTPUT_BYTES} /dev/zero");
        let done = agent.sh(ID, &fits).await.expect("just fits");
        assert_eq!(done.stdout.len(), MAX_EXEC_OUTPUT_BYTES);
        let error = agent
            .sh(ID, "exec cat /dev/zero")
            .await
            .expect_err("too much");
        assert_eq!(error.code, ErrorCode::OutOfRange, "{error}");
        assert!(error.to_string().contains("stdout"), "{error}");
        assert!(calls(agent).contains("signal "), "it was not killed");
    });
}

#[test]
fn a_time_limit_ends_the_command_and_its_end_is_told() {
    with_sandbox(async |agent| {
        let request = pb::ExecRequest {
            timeout_sec: 1,
            ..exec_request(ID, "sleep", &["100"])
        };
        let done = agent
            .client
            .exec(request)
            .await
            .expect("an exit")
            .into_owned();
        assert_eq!(
            (done.exit_code, done.error.as_str()),
            (-1, "timed out after 1 s: signal: killed")
        );
        let request = pb::ExecRequest {
            timeout_sec: u32::MAX,
            ..exec_request(ID, "true", &[])
        };
        let error = agent.client.exec(request).await.expect_err("too long");
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
        assert!(error.to_string().contains("timeout_sec"), "{error}");
    });
}

#[test]
fn a_command_that_is_waited_for_counts_as_use_while_it_is_silent() {
    with_sandbox(async |agent| {
        let active = async || agent.find(ID).await.expect("listed").last_active_unix_ms;
        let command = agent.sh(ID, "sleep 3");
        let watch = async {
            agent::until("the command", async || {
                calls(agent).contains("start").then_some(())
            })
            .await;
            let first = active().await;
            agent::until("later activity", async || {
                (active().await > first + 900).then_some(())
            })
            .await;
        };
        let (done, ()) = tokio::join!(command, watch);
        assert_eq!(done.expect("run").exit_code, 0);
    });
}

#[test]
fn the_guests_errors_keep_their_codes() {
    with_sandbox(async |agent| {
        let client = &agent.client;
        let error = agent
            .sh("sb-none", "true")
            .await
            .expect_err("unknown sandbox");
        assert_eq!(error.code, ErrorCode::NotFound, "{error}");
        let request = exec_request(ID, "/no/such/program", &[]);
        let error = client.exec(request).await.expect_err("no such program");
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
        let request = pb::ExecRequest {
            user: "a:b".into(),
            ..exec_request(ID, "true", &[])
        };
        let error = client.exec(request).await.expect_err("invalid user name");
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
        let request = pb::ConnectProcessRequest {
            id: ID.into(),
            ..Default::default()
        };
        let error = match client.connect_process(request).await {
            Ok(mut events) => events.message().await.expect_err("no such process"),
            Err(error) => error,
        };
        assert_eq!(error.code, ErrorCode::NotFound, "{error}");

        let read = async |path: &str, user: &str| {
            let meta = pb::FileMeta {
                user: user.to_owned(),
                ..meta(ID, path)
            };
            let request = pb::ReadFileRequest {
                meta: meta.into(),
                ..Default::default()
            };
            client.read_file(request).await.expect_err(path)
        };
        let error = read("/no/such/file", "").await;
        assert_eq!(error.code, ErrorCode::NotFound, "{error}");
        assert!(error.to_string().contains("no such file"), "{error}");
        assert_eq!(read("/tmp", "").await.code, ErrorCode::InvalidArgument);
        assert_eq!(
            read("/tmp/x", "no-such-user").await.code,
            ErrorCode::InvalidArgument
        );
        assert_eq!(read("", "").await.code, ErrorCode::InvalidArgument);
        let full = pb::WriteFileRequest {
            meta: meta(ID, "/full").into(),
            content: b"x".to_vec(),
            ..Default::default()
        };
        let error = client.write_file(full).await.expect_err("full");
        assert_eq!(error.code, ErrorCode::ResourceExhausted, "{error}");

        let make = || pb::MakeDirRequest {
            meta: meta(ID, &path(agent, "dir")).into(),
            ..Default::default()
        };
        let made = client.make_dir(make()).await.expect("made").into_owned();
        assert_eq!(made.entry.path, path(agent, "dir"));
        let error = client.make_dir(make()).await.expect_err("exists");
        assert_eq!(error.code, ErrorCode::AlreadyExists, "{error}");
    });
}

#[test]
fn processes_and_directories_are_managed_by_the_guest() {
    with_sandbox(async |agent| {
        let client = &agent.client;
        let selector = || guest::ProcessSelector {
            selector: Some(Selector::Tag("t".into())),
            ..Default::default()
        };
        let request = pb::ListProcessesRequest {
            id: ID.into(),
            ..Default::default()
        };
        let listed = client
            .list_processes(request)
            .await
            .expect("listed")
            .into_owned();
        assert_eq!(listed.processes[0].pid, 42);
        let request = pb::SendInputRequest {
            id: ID.into(),
            process: selector().into(),
            ..Default::default()
        };
        client.send_input(request).await.expect("sent");
        let request = pb::CloseStdinRequest {
            id: ID.into(),
            process: selector().into(),
            ..Default::default()
        };
        client.close_stdin(request).await.expect("closed");
        let request = pb::ResizePtyRequest {
            id: ID.into(),
            process: selector().into(),
            cols: 100,
            rows: 30,
            ..Default::default()
        };
        client.resize_pty(request).await.expect("resized");
        let request = pb::SignalProcessRequest {
            id: ID.into(),
            process: selector().into(),
            ..Default::default()
        };
        let error = client
            .signal_process(request)
            .await
            .expect_err("no such process");
        assert_eq!(error.code, ErrorCode::NotFound, "{error}");
        let calls = calls(agent);
        for call in ["input", "close", "update 100x30"] {
            assert!(
                calls.contains(call),
                "{call} did not reach the guest: {calls}"
            );
        }
        // User of the process: given by basic authentication, otherwise the guest's default.
        let request = pb::ExecRequest {
            user: "root".into(),
            ..exec_request(ID, "true", &[])
        };
        client.exec(request).await.expect("run");
        assert!(self::calls(agent).contains("start Basic cm9vdDo="));

        fs::write(path(agent, "dir-entry"), "").expect("written");
        let request = pb::ListDirRequest {
            meta: meta(ID, &path(agent, "")).into(),
            ..Default::default()
        };
        let listed = client.list_dir(request).await.expect("listed").into_owned();
        assert!(listed.entries.iter().any(|entry| entry.name == "dir-entry"));
        fs::create_dir(path(agent, "gone")).expect("made");
        let request = pb::RemovePathRequest {
            meta: meta(ID, &path(agent, "gone")).into(),
            ..Default::default()
        };
        client.remove_path(request).await.expect("removed");
        assert!(!PathBuf::from(path(agent, "gone")).exists());
    });
}

/// Content of a test file from a given offset.
fn pattern(start: u64, length: usize) -> Vec<u8> {
    (start..)
        .take(length)
        .map(|n| (n % 251).to_le_bytes()[0])
        .collect()
}

fn pieces(size: u64) -> impl Iterator<Item = Vec<u8>> {
    let chunk = FILE_CHUNK_BYTES as u64;
    (0..size).step_by(FILE_CHUNK_BYTES).map(move |start| {
        pattern(
            start,
            usize::try_from(chunk.min(size - start)).expect("a chunk"),
        )
    })
}

fn upload(to: &str, size: u64) -> impl Iterator<Item = pb::WriteFileStreamRequest> + use<> {
    let part = |part: Part| pb::WriteFileStreamRequest {
        part: Some(part),
        ..Default::default()
    };
    std::iter::once(part(meta(ID, to).into()))
        .chain(pieces(size).map(move |bytes| part(Part::Chunk(bytes))))
}

#[test]
fn files_of_any_size_are_whole_in_both_directions() {
    with_sandbox(async |agent| {
        let chunk = FILE_CHUNK_BYTES as u64;
        for size in [0, 1, chunk - 1, chunk, chunk + 1, 3_000_000] {
            let file = path(agent, "file");
            let sent = agent
                .client
                .write_file_stream(futures::stream::iter(upload(&file, size)))
                .await;
            assert_eq!(sent.expect("written").into_owned().size_bytes, size);
            let expected: Vec<u8> = pieces(size).flatten().collect();
            assert_eq!(fs::read(&file).expect("there"), expected);
            assert_eq!(download(agent, &file).await.expect("read"), expected);
            let whole = pb::ReadFileRequest {
                meta: meta(ID, &file).into(),
                ..Default::default()
            };
            let whole = agent
                .client
                .read_file(whole)
                .await
                .expect("read")
                .into_owned();
            assert_eq!(whole.content, expected);
        }
    });
}

async fn download(agent: &TestAgent, file: &str) -> Result<Vec<u8>, connectrpc::ConnectError> {
    let request = pb::ReadFileStreamRequest {
        meta: meta(ID, file).into(),
        ..Default::default()
    };
    let mut chunks = agent.client.read_file_stream(request).await?;
    let mut content = Vec::new();
    while let Some(message) = chunks.message().await? {
        let chunk = message.to_owned_message().chunk;
        assert!(chunk.len() <= FILE_CHUNK_BYTES);
        content.extend_from_slice(&chunk);
    }
    Ok(content)
}

#[test]
fn a_large_file_passes_through_in_constant_memory() {
    with_sandbox(async |agent| {
        const SIZE: u64 = 200_000_000;
        let file = path(agent, "large");
        let before = peak_memory_kib();
        let sent = agent
            .client
            .write_file_stream(futures::stream::iter(upload(&file, SIZE)))
            .await;
        assert_eq!(sent.expect("written").into_owned().size_bytes, SIZE);
        let request = pb::ReadFileStreamRequest {
            meta: meta(ID, &file).into(),
            ..Default::default()
        };
        let mut chunks = agent
            .client
            .read_file_stream(request)
            .await
            .expect("opened");
        let mut received = 0;
        while let Some(message) = chunks.message().await.expect("a chunk") {
            let chunk = message.to_owned_message().chunk;
            assert!(
                chunk == pattern(received, chunk.len()),
                "differs after {received}"
            );
            received += chunk.len() as u64;
        }
        assert_eq!(received, SIZE);
        let grown = peak_memory_kib() - before;
        assert!(grown < 32 * 1024, "memory grew by {grown} KiB");
    });
}

#[test]
fn a_file_that_breaks_off_is_an_error_and_never_short() {
    with_sandbox(async |agent| {
        let error = download(agent, "/breaks-off").await.expect_err("broke off");
        assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
        // The same applies if the whole VM is lost.
        fs::write(path(agent, "long"), vec![0; 50_000_000]).expect("written");
        let request = pb::ReadFileStreamRequest {
            meta: meta(ID, &path(agent, "long")).into(),
            ..Default::default()
        };
        let mut chunks = agent
            .client
            .read_file_stream(request)
            .await
            .expect("opened");
        chunks.message().await.expect("a chunk").expect("a chunk");
        agent::kill_9(agent.supervisor_pid(ID));
        let error = loop {
            match chunks.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the truncated file looks complete"),
                Err(error) => break error,
            }
        };
        assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    });
}

#[test]
fn an_upload_that_its_sender_gives_up_is_given_up_in_the_guest() {
    with_sandbox(async |agent| {
        let file = path(agent, "torn");
        let beginning = futures::stream::iter(upload(&file, 1_000_000));
        let never_ends = beginning.chain(futures::stream::pending());
        let call = agent.client.write_file_stream(never_ends);
        let arrived = agent::until("the beginning", async || {
            fs::metadata(&file)
                .is_ok_and(|meta| meta.len() > 100_000)
                .then_some(())
        });
        tokio::select! {
            _ = call => panic!("the upload must not complete"),
            () = arrived => {}
        }
        let told = format!("{file}.broke-off");
        agent::until("the guest's report", async || {
            PathBuf::from(&told).exists().then_some(())
        })
        .await;
    });
}

#[test]
fn an_upload_that_does_not_say_where_to_first_is_refused() {
    with_sandbox(async |agent| {
        let chunk = pb::WriteFileStreamRequest {
            part: Some(Part::Chunk(vec![1])),
            ..Default::default()
        };
        for wrong in [vec![], vec![chunk.clone()]] {
            let error = agent
                .client
                .write_file_stream(futures::stream::iter(wrong))
                .await
                .expect_err("refused");
            assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
            assert!(error.to_string().contains("meta"), "{error}");
        }
    });
}

#[test]
fn a_sandbox_that_hangs_delays_no_other() {
    with_sandbox(async |agent| {
        agent.create("sb-other").await.expect("made");
        let hanging: Vec<_> = (0..50)
            .map(|_| {
                let client = agent.client.clone();
                tokio::spawn(async move { client.exec(exec_request(ID, "sleep", &["1000"])).await })
            })
            .collect();
        agent::until("fifty commands", async || {
            (calls(agent).matches("start").count() == 50).then_some(())
        })
        .await;
        for n in 0..20 {
            let script = format!("echo {n}");
            let run = agent.sh("sb-other", &script);
            let done = tokio::time::timeout(Duration::from_secs(20), run)
                .await
                .expect("in time");
            assert_eq!(done.expect("run").stdout, format!("{n}\n").into_bytes());
        }
        agent.destroy("sb-other").await.expect("destroyed");
        for call in hanging {
            call.abort();
        }
    });
}
