//! Input of processes.

use connectrpc::ErrorCode;
use wrenn_proto::rpc::process::{
    __buffa::oneof::{process_input::Input, stream_input_request::Event},
    ProcessInput, Signal, StreamInputRequest,
    stream_input_request::{DataEvent, KeepAlive, StartEvent},
};

use crate::{
    calls::{CODECS, by_pid, clients, clients_by, program, script_with_input},
    world::{eventually, run},
};

fn stdin(text: &str) -> Input {
    Input::Stdin(text.as_bytes().to_vec())
}

#[test]
fn input_arrives_in_order_and_its_end_is_seen() {
    run(async |world| {
        for codec in CODECS {
            let clients = clients_by(world, codec);
            let mut events = clients
                .start(script_with_input("cat; echo end"))
                .await
                .expect("started");
            let pid = events.pid().await;
            let mut wanted = String::new();
            for number in 0..50 {
                let line = format!("{number}\n");
                clients.send(by_pid(pid), stdin(&line)).await.expect("sent");
                wanted.push_str(&line);
            }
            clients.close_stdin(pid).await.expect("closed");
            assert_eq!(events.rest().await.text(), wanted + "end\n");
        }
    });
}

#[test]
fn closing_twice_is_fine_and_input_after_it_is_not() {
    run(async |world| {
        let clients = clients(world);
        let mut events = clients
            .start(script_with_input("cat; sleep 1000"))
            .await
            .expect("started");
        let pid = events.pid().await;
        clients.close_stdin(pid).await.expect("closed");
        clients.close_stdin(pid).await.expect("still closed");
        assert_eq!(
            clients
                .send(by_pid(pid), stdin("x"))
                .await
                .expect_err("closed")
                .code,
            ErrorCode::Internal
        );
        let terminal = Input::Pty(b"x".to_vec());
        assert_eq!(
            clients
                .send(by_pid(pid), terminal)
                .await
                .expect_err("no terminal")
                .code,
            ErrorCode::Internal
        );
        let mut events = clients
            .start(program(&["sleep", "1000"]))
            .await
            .expect("started");
        let other = events.pid().await;
        assert_eq!(
            clients
                .send(by_pid(other), stdin("x"))
                .await
                .expect_err("none")
                .code,
            ErrorCode::Internal
        );
        clients.close_stdin(other).await.expect("nothing to close");
        assert_eq!(
            clients
                .send(by_pid(999_999), stdin("x"))
                .await
                .expect_err("unknown")
                .code,
            ErrorCode::NotFound
        );
    });
}

#[test]
fn a_process_that_reads_late_gets_all_and_can_be_killed_meanwhile() {
    run(async |world| {
        let clients = clients(world);
        let mut events = clients
            .start(script_with_input("sleep 0.5; wc -c"))
            .await
            .expect("started");
        let pid = events.pid().await;
        let large = "x".repeat(1_000_000);
        clients
            .send(by_pid(pid), stdin(&large))
            .await
            .expect("sent once it was read");
        clients.close_stdin(pid).await.expect("closed");
        assert_eq!(events.rest().await.text().trim(), "1000000");
        // A process that never reads blocks the sender, but not a signal.
        let mut events = clients
            .start(script_with_input("sleep 1000"))
            .await
            .expect("started");
        let pid = events.pid().await;
        let sending = clients.send(by_pid(pid), stdin(&large));
        tokio::pin!(sending);
        let stuck = tokio::time::timeout(std::time::Duration::from_millis(300), &mut sending).await;
        assert!(stuck.is_err(), "the pipe is full");
        clients
            .signal(pid, Signal::SIGNAL_SIGKILL)
            .await
            .expect("sent");
        sending.await.expect_err("the reader was killed");
        assert_eq!(events.rest().await.end.exit_code, -1);
    });
}

fn data(input: Input) -> StreamInputRequest {
    let input = ProcessInput {
        input: Some(input),
        ..Default::default()
    };
    let data = DataEvent {
        input: input.into(),
        ..Default::default()
    };
    StreamInputRequest {
        event: Some(Event::from(data)),
        ..Default::default()
    }
}

#[test]
fn a_stream_of_input_is_applied_in_order() {
    run(async |world| {
        for codec in CODECS {
            let clients = clients_by(world, codec);
            let mut events = clients
                .start(script_with_input("cat"))
                .await
                .expect("started");
            let pid = events.pid().await;
            let start = StartEvent {
                process: by_pid(pid).into(),
                ..Default::default()
            };
            let mut messages = vec![StreamInputRequest {
                event: Some(Event::from(start)),
                ..Default::default()
            }];
            messages.extend((0..200).map(|n| data(stdin(&format!("{n}\n")))));
            let alive = KeepAlive::default();
            messages.push(StreamInputRequest {
                event: Some(Event::from(alive)),
                ..Default::default()
            });
            clients
                .process
                .stream_input(futures::stream::iter(messages))
                .await
                .expect("applied");
            clients.close_stdin(pid).await.expect("closed");
            let wanted: String = (0..200).map(|n| format!("{n}\n")).collect();
            assert_eq!(events.rest().await.text(), wanted);
            let error = clients
                .process
                .stream_input(futures::stream::iter([data(stdin("x"))]))
                .await
                .expect_err("no start");
            assert_eq!(error.code, ErrorCode::InvalidArgument);
        }
    });
}

#[test]
fn senders_who_wait_do_not_stay_when_the_client_goes() {
    run(async |world| {
        let clients = clients(world);
        let mut events = clients
            .start(script_with_input("read first; sleep 0.1; cat"))
            .await
            .expect("started");
        let pid = events.pid().await;
        let large = "x".repeat(500_000) + "\n";
        {
            let other = crate::calls::clients(world);
            let sending = other.send(by_pid(pid), stdin(&large));
            let _ = tokio::time::timeout(std::time::Duration::from_millis(1), sending).await;
        }
        // However much of the first input arrived, the next input arrives complete and after it.
        clients
            .send(by_pid(pid), stdin("MARK\n"))
            .await
            .expect("sent");
        clients.close_stdin(pid).await.expect("closed");
        let text = String::from_utf8(events.rest().await.stdout).expect("UTF-8");
        assert!(
            text.is_empty() || text.ends_with("MARK\n"),
            "{}",
            text.len()
        );
        eventually("nothing is left", async || clients.list().await.is_empty()).await;
    });
}
