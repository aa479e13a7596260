//! Commands in the guest, through tunnels of the agent. The client itself is tested in
//! `wrenn-envd-client`, and the calls of the API in `wrenn-api`.

use std::{fs, time::Duration};

use connectrpc::ErrorCode;
use wrenn_envd_client::Exec;
use wrenn_proto::rpc::process::{ProcessConfig, StartRequest, process_event::Event};

use crate::agent::{self, TestAgent, on_private_host};

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

fn calls(agent: &TestAgent) -> String {
    fs::read_to_string(agent.sandbox_dir(ID).join("calls.log")).expect("calls")
}

fn command(cmd: &str, args: &[&str]) -> ProcessConfig {
    ProcessConfig {
        cmd: cmd.to_owned(),
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        ..Default::default()
    }
}

#[test]
fn commands_run_over_one_tunnel_or_many() {
    with_sandbox(async |agent| {
        let guest = agent.guest(ID);
        for n in 0..100 {
            let exec = Exec {
                process: command("sh", &["-c", &format!("echo {n}")]),
                user: "root".to_owned(),
                ..Exec::default()
            };
            let done = guest.exec(exec).await.expect("run");
            assert_eq!(
                (done.stdout, done.exit_code),
                (format!("{n}\n").into_bytes(), 0)
            );
            let done = agent.sh(ID, &format!("echo {n}")).await.expect("run");
            assert_eq!(done.stdout, format!("{n}\n").into_bytes());
        }
        // User of the process: given by basic authentication, otherwise the guest's default.
        let calls = calls(agent);
        assert!(calls.contains("start Basic cm9vdDo=") && calls.contains("start -"));
        let error = agent.sh("sb-none", "true").await.expect_err("unknown");
        assert_eq!(error.code, ErrorCode::NotFound, "{error}");
    });
}

#[test]
fn stream_of_a_lost_vm_ends_with_an_error() {
    with_sandbox(async |agent| {
        let start = StartRequest {
            process: command("cat", &["/dev/zero"]).into(),
            ..Default::default()
        };
        let started = agent.guest(ID).start(start, "", None, false).await;
        let mut events = started.expect("started");
        let first = events.next().await.expect("an event").expect("an event");
        assert!(matches!(first.event, Some(Event::Start(_))));
        agent::kill_9(agent.supervisor_pid(ID));
        let error = loop {
            match events.next().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the truncated stream ended normally"),
                Err(error) => break error,
            }
        };
        assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    });
}

#[test]
fn hanging_commands_do_not_delay_other_sandboxes() {
    with_sandbox(async |agent| {
        agent.create("sb-other").await.expect("made");
        let guest = agent.guest(ID);
        let hanging: Vec<_> = (0..50)
            .map(|_| {
                let guest = guest.clone();
                let exec = Exec {
                    process: command("sleep", &["1000"]),
                    ..Exec::default()
                };
                tokio::spawn(async move { guest.exec(exec).await })
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
