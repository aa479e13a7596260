//! Terminals.

use connectrpc::ErrorCode;
use wrenn_proto::rpc::process::{
    __buffa::oneof::process_input::Input, PTY, Signal, StartRequest, UpdateRequest, pty::Size,
};

use crate::{
    calls::{CODECS, Clients, as_user, by_pid, clients, clients_by, program, refusal, script},
    world::{World, eventually, run},
};

fn pty(cols: u32, rows: u32) -> PTY {
    PTY {
        size: Size {
            cols,
            rows,
            ..Default::default()
        }
        .into(),
        ..Default::default()
    }
}

pub(crate) fn in_terminal(request: StartRequest, cols: u32, rows: u32) -> StartRequest {
    StartRequest {
        pty: pty(cols, rows).into(),
        stdin: None,
        ..request
    }
}

async fn type_in(clients: &Clients, pid: u32, text: &str) {
    let input = Input::Pty(text.as_bytes().to_vec());
    clients.send(by_pid(pid), input).await.expect("typed");
}

async fn resize(
    clients: &Clients,
    pid: u32,
    cols: u32,
    rows: u32,
) -> Result<(), connectrpc::ConnectError> {
    let request = UpdateRequest {
        process: by_pid(pid).into(),
        pty: pty(cols, rows).into(),
        ..Default::default()
    };
    clients.process.update(request).await.map(drop)
}

#[test]
fn a_burst_of_input_then_resize_then_kill_all_take_effect() {
    run(async |world| {
        for codec in CODECS {
            let clients = clients_by(world, codec);
            let request = in_terminal(
                script(
                    "stty -echo -icanon; echo ready; head -c 20000 | sha256sum; stty size; read x; stty size; cat",
                ),
                90,
                33,
            );
            let mut events = clients.start(request).await.expect("started");
            let pid = events.pid().await;
            events.until("ready").await;
            let mut typed = String::new();
            for number in 0..2500 {
                let piece = format!("{number:08}");
                typed.push_str(&piece);
            }
            for piece in typed.as_bytes().chunks(40) {
                type_in(&clients, pid, std::str::from_utf8(piece).expect("ASCII")).await;
            }
            let seen = events.until("33 90").await;
            let wanted = clients.sh("printf '%08d' $(seq 0 2499) | sha256sum").await;
            assert!(seen.contains(&wanted[..64]), "{seen}");
            resize(&clients, pid, 120, 40).await.expect("resized");
            type_in(&clients, pid, "go\n").await;
            events.until("40 120").await;
            for _ in 0..100 {
                type_in(&clients, pid, "burst\n").await;
            }
            resize(&clients, pid, 1, 1).await.expect("resized");
            clients
                .signal(pid, Signal::SIGNAL_SIGKILL)
                .await
                .expect("sent");
            let outcome = events.rest().await;
            assert_eq!((outcome.ends, outcome.end.exit_code), (1, -1));
            eventually("it is gone", async || !world.runs(pid)).await;
        }
    });
}

#[test]
fn a_terminal_is_the_users_own_and_controls_the_session() {
    run(async |world| {
        let clients = clients(world);
        for user in ["root", "user", "nobody"] {
            let request = in_terminal(
                script(
                    "test -t 0 && test -t 1 && test -t 2; tty; id -un; : > /dev/tty && echo mine; ps -o tpgid= -p $$; echo $$; pwd",
                ),
                80,
                24,
            );
            let events = clients.start_with(request, as_user(user)).await;
            // The home directory of user `nobody` does not exist, so the call is rejected with a
            // reason.
            if user == "nobody" {
                let error = refusal(events).await;
                assert_eq!(error.code, ErrorCode::InvalidArgument);
                continue;
            }
            let outcome = events.expect("started").rest().await;
            let text = String::from_utf8(outcome.terminal).expect("UTF-8");
            let lines: Vec<_> = text.lines().map(str::trim).collect();
            assert!(lines[0].starts_with("/dev/pts/"), "{text}");
            assert_eq!((lines[1], lines[2]), (user, "mine"), "{text}");
            assert_eq!(lines[3], lines[4], "{text}");
            assert_eq!(
                lines[5],
                if user == "root" {
                    "/root"
                } else {
                    "/home/user"
                }
            );
        }
    });
}

#[test]
fn control_characters_reach_the_foreground_job() {
    run(async |world| {
        let clients = clients(world);
        let mut events = clients
            .start(in_terminal(program(&["/bin/bash", "-i"]), 80, 24))
            .await
            .expect("started");
        let pid = events.pid().await;
        type_in(&clients, pid, "PS1='$ '; sleep 1000\n").await;
        events.until("sleep 1000").await;
        eventually("sleep runs", async || child_named(world, pid, "sleep")).await;
        type_in(&clients, pid, "\x03").await;
        type_in(&clients, pid, "echo al''ive\n").await;
        events.until("alive").await;
        assert_eq!(
            clients.close_stdin(pid).await.expect_err("a terminal").code,
            ErrorCode::Unknown
        );
        type_in(&clients, pid, "exit 5\n").await;
        assert_eq!(events.rest().await.end.exit_code, 5);
    });
}

fn child_named(world: &World, pid: u32, name: &str) -> bool {
    let path = world.path(&format!("/proc/{pid}/task/{pid}/children"));
    let children = std::fs::read_to_string(path).unwrap_or_default();
    children.split_whitespace().any(|child| {
        let path = world.path(&format!("/proc/{child}/comm"));
        std::fs::read_to_string(path).is_ok_and(|comm| comm.trim() == name)
    })
}

#[test]
fn a_terminal_ends_with_its_process_although_a_child_holds_it() {
    run(async |world| {
        for codec in CODECS {
            let clients = clients_by(world, codec);
            let text = "trap '' HUP; setsid sleep 1000 & echo $!; seq 1000; exit 3";
            let request = in_terminal(script(text), 80, 24);
            let outcome = clients.run(request).await;
            assert_eq!((outcome.ends, outcome.end.exit_code), (1, 3));
            let text = String::from_utf8(outcome.terminal).expect("UTF-8");
            assert!(text.ends_with("\r\n1000\r\n"), "{text}");
            let pid = text.lines().next().expect("a line").parse();
            assert!(world.runs(pid.expect("a PID")), "the child lives on");
        }
    });
}

#[test]
fn much_output_of_a_terminal_arrives_whole() {
    run(async |world| {
        let clients = clients(world);
        let outcome = clients
            .run(in_terminal(script("stty -opost; seq 500000"), 80, 24))
            .await;
        let text = String::from_utf8(outcome.terminal).expect("UTF-8");
        let lines = text.lines().enumerate();
        for (number, line) in lines {
            assert_eq!(line, (number + 1).to_string());
        }
        assert!(text.ends_with("500000\n"));
    });
}

#[test]
fn what_has_no_terminal_cannot_be_resized_and_no_size_is_too_large() {
    run(async |world| {
        let clients = clients(world);
        let mut events = clients
            .start(program(&["sleep", "1000"]))
            .await
            .expect("started");
        let pid = events.pid().await;
        assert_eq!(
            resize(&clients, pid, 80, 24)
                .await
                .expect_err("no terminal")
                .code,
            ErrorCode::Internal
        );
        let error = refusal(clients.start(in_terminal(script("true"), 70_000, 24)).await).await;
        assert_eq!(error.code, ErrorCode::InvalidArgument);
        let mut events = clients
            .start(in_terminal(script("cat"), 80, 24))
            .await
            .expect("started");
        let pid = events.pid().await;
        assert_eq!(
            resize(&clients, pid, 80, 65_536)
                .await
                .expect_err("too many")
                .code,
            ErrorCode::InvalidArgument
        );
    });
}
