//! Starting and ending processes.

use std::time::{Duration, Instant};

use connectrpc::ErrorCode;
use wrenn_proto::rpc::process::{ProcessConfig, Signal, StartRequest};

use crate::{
    calls::{CODECS, as_user, by_tag, clients, clients_by, limit, program, refusal, script},
    world::{eventually, run, run_with},
};

fn config(request: &StartRequest) -> ProcessConfig {
    request.process.as_option().cloned().expect("there")
}

fn with(request: StartRequest, change: impl FnOnce(&mut ProcessConfig)) -> StartRequest {
    let mut process = config(&request);
    change(&mut process);
    StartRequest {
        process: process.into(),
        ..request
    }
}

#[test]
fn each_end_is_told_in_the_words_of_the_contract() {
    run(async |world| {
        for codec in CODECS {
            let clients = clients_by(world, codec);
            let end = clients.run(script("exit 3")).await.end;
            assert_eq!(
                (
                    end.exit_code,
                    end.exited,
                    end.status.as_str(),
                    end.error.as_deref()
                ),
                (3, true, "exit status 3", Some("exit status 3"))
            );
            let end = clients.run(script("exit 0")).await.end;
            assert_eq!(
                (
                    end.exit_code,
                    end.exited,
                    end.status.as_str(),
                    end.error.as_deref()
                ),
                (0, true, "exit status 0", None)
            );
            let end = clients.run(script("kill -9 $$")).await.end;
            assert_eq!(
                (end.exit_code, end.exited, end.error.as_deref()),
                (-1, false, Some("signal: killed"))
            );
        }
    });
}

#[test]
fn the_environment_is_the_agents_path_the_user_the_host_and_the_request_in_this_order() {
    run_with(&[], &[("LEAKED", "secret")], async |world| {
        let clients = clients(world);
        let body = serde_json::json!({"envVars": {"A": "host", "B": "host", "HOME": "/mnt"}});
        let init = reqwest::Client::new()
            .post(world.url("/init"))
            .json(&body)
            .send()
            .await;
        assert_eq!(init.expect("answered").status(), 204);
        let request = with(program(&["env"]), |p| {
            p.envs = [
                ("B", "request"),
                ("C", "a=b c"),
                ("", "x"),
                ("BAD=NAME", "x"),
            ]
            .map(|(n, v)| (n.to_owned(), v.to_owned()))
            .into_iter()
            .collect();
        });
        let events = clients
            .start_with(request, as_user("user"))
            .await
            .expect("started");
        let text = events.rest().await.text();
        let mut lines: Vec<_> = text
            .lines()
            .filter(|line| !line.starts_with("PATH="))
            .collect();
        lines.sort_unstable();
        assert_eq!(
            lines,
            [
                "A=host",
                "B=request",
                "C=a=b c",
                "HOME=/mnt",
                "LANG=C.UTF-8",
                "LOGNAME=user",
                "USER=user"
            ]
        );
        assert!(text.contains("PATH=/usr/local/sbin:"), "{text}");
    });
}

#[test]
fn the_locale_is_utf_8_unless_the_image_or_the_request_says_otherwise() {
    run(async |world| {
        let clients = clients(world);
        let lang = async |given: Option<&str>| {
            let request = with(script("echo $LANG $LC_ALL; printf ä | wc -m"), |p| {
                let envs = given.map(|value| ("LANG".to_owned(), value.to_owned()));
                p.envs = envs.into_iter().collect();
            });
            let started = clients.start(request).await.expect("started");
            started.rest().await.text()
        };
        assert_eq!(lang(None).await, "C.UTF-8\n1\n");
        assert_eq!(lang(Some("C")).await, "C\n2\n");
        assert_eq!(lang(Some("")).await, "\n2\n");
        world.write("/etc/default/locale", "LANG=\"C\"\nLC_ALL=C\n");
        assert_eq!(lang(None).await, "C C\n2\n");
    });
}

#[test]
fn the_directory_is_the_asked_one_the_default_or_the_home() {
    run(async |world| {
        let clients = clients(world);
        let pwd = async |cwd: Option<&str>, user: &str| {
            let request = with(program(&["pwd"]), |p| p.cwd = cwd.map(str::to_owned));
            clients
                .start_with(request, as_user(user))
                .await
                .expect("started")
                .rest()
                .await
                .text()
        };
        assert_eq!(pwd(None, "user").await, "/home/user\n");
        assert_eq!(pwd(None, "root").await, "/root\n");
        assert_eq!(pwd(Some("/mnt/work"), "user").await, "/mnt/work\n");
        assert_eq!(pwd(Some("~"), "user").await, "/home/user\n");
        assert_eq!(pwd(Some(".."), "user").await, "/home\n");
        let body = serde_json::json!({"defaultWorkdir": "/mnt/work"});
        reqwest::Client::new()
            .post(world.url("/init"))
            .json(&body)
            .send()
            .await
            .expect("answered");
        assert_eq!(pwd(None, "user").await, "/mnt/work\n");
        for (user, cwd, message) in [
            ("root", "/no/such", "cwd '/no/such' does not exist"),
            (
                "root",
                "/etc/passwd",
                "cwd '/etc/passwd' is not a directory",
            ),
            (
                "user",
                "/root",
                "cwd '/root' cannot be entered by user 'user'",
            ),
        ] {
            for terminal in [false, true] {
                let request = with(program(&["pwd"]), |p| p.cwd = Some(cwd.into()));
                let request = if terminal {
                    crate::terminal::in_terminal(request, 80, 24)
                } else {
                    request
                };
                let error = refusal(clients.start_with(request, as_user(user)).await).await;
                assert_eq!(
                    (error.code, error.message.as_deref()),
                    (ErrorCode::InvalidArgument, Some(message))
                );
            }
        }
    });
}

#[test]
fn a_user_has_only_the_users_groups_and_rank() {
    run(async |world| {
        let clients = clients(world);
        let as_ = async |user: &str, text: &str| {
            let request = with(script(text), |p| p.cwd = Some("/".into()));
            clients
                .start_with(request, as_user(user))
                .await
                .expect("started")
                .rest()
                .await
                .text()
        };
        assert_eq!(
            as_("user", "id -u; id -g; id -G").await,
            "1000\n1000\n1000 1001 1002\n"
        );
        assert_eq!(as_("nobody", "id -u; id -G").await, "65534\n65534\n");
        assert_eq!(as_("root", "id -u; id -G").await, "0\n0\n");
        assert_eq!(
            as_("nobody", "nice; cat /proc/self/oom_score_adj").await,
            "0\n100\n"
        );
        assert_eq!(
            as_("user", "grep ^Cap[EP] /proc/self/status | tr -d '\\t'").await,
            "CapPrm:0000000000000000\nCapEff:0000000000000000\n"
        );
        // The agent's own limits are not inherited either: the soft limit is the one that the agent
        // was started with.
        let own = std::fs::read_to_string("/proc/self/limits").expect("readable");
        let own = own.lines().find(|line| line.starts_with("Max open files"));
        let soft = own
            .and_then(|line| line.split_whitespace().nth(3))
            .expect("a limit");
        assert_eq!(as_("user", "ulimit -Sn").await, format!("{soft}\n"));
        // The agent's own descriptors are not inherited.
        assert_eq!(as_("user", "ls /proc/self/fd").await, "0\n1\n2\n3\n");
        let error = refusal(clients.start_with(script("id"), as_user("root123")).await).await;
        assert_eq!(
            (error.code, error.message.as_deref()),
            (
                ErrorCode::Unauthenticated,
                Some("invalid username: 'root123'")
            )
        );
    });
}

#[test]
fn signals_start_from_the_default() {
    run(async |world| {
        let text = clients(world)
            .sh("grep -E '^Sig(Blk|Ign)' /proc/self/status | tr -d '\\t'")
            .await;
        assert_eq!(text, "SigBlk:0000000000000000\nSigIgn:0000000000000000\n");
    });
}

#[test]
fn a_program_that_is_not_there_is_refused() {
    run(async |world| {
        let clients = clients(world);
        world.write("/mnt/work/script", "#!/no/such/interpreter\n");
        clients.sh("chmod +x /mnt/work/script").await;
        for (words, exit_code) in [
            (&["/no/such/program"][..], Some("127")),
            (&["no-such-program"], Some("127")),
            (&["/etc/passwd/x"], Some("127")),
            (&["/etc/passwd"], Some("126")),
            (&["/etc"], Some("126")),
            (&["/mnt/work/script"], Some("126")),
            (&[""], None),
            (&["bad\0name"], None),
            (&["/bin/sh", "nul\0"], None),
        ] {
            let error = refusal(clients.start(program(words)).await).await;
            assert_eq!(error.code, ErrorCode::InvalidArgument, "{words:?}: {error}");
            let told = error.trailers().get("wrenn-exit-code");
            let told = told.map(|code| code.to_str().expect("text").to_owned());
            assert_eq!(told.as_deref(), exit_code, "{words:?}: {error}");
        }
        let error = refusal(clients.start(StartRequest::default()).await).await;
        assert_eq!(error.code, ErrorCode::InvalidArgument);
        assert!(clients.list().await.is_empty());
    });
}

#[test]
fn processes_are_found_by_tag_and_listed() {
    run(async |world| {
        let clients = clients(world);
        let mut all = Vec::new();
        for tag in ["a", "b", "c"] {
            let request = StartRequest {
                tag: Some(tag.into()),
                ..program(&["sleep", "100"])
            };
            let mut events = clients.start(request).await.expect("started");
            all.push((tag, events.pid().await, events));
        }
        for (tag, pid, _) in &all {
            assert_eq!(
                clients
                    .connect(by_tag(tag))
                    .await
                    .expect("there")
                    .pid()
                    .await,
                *pid
            );
        }
        let list = clients.list().await;
        let listed: Vec<_> = list
            .iter()
            .map(|p| (p.tag.as_deref().expect("a tag"), p.pid))
            .collect();
        assert_eq!(
            listed,
            all.iter()
                .map(|(tag, pid, _)| (*tag, *pid))
                .collect::<Vec<_>>()
        );
        assert_eq!(list[0].config.as_option().expect("there").args, ["100"]);
        for (_, pid, events) in all {
            clients
                .signal(pid, Signal::SIGNAL_SIGTERM)
                .await
                .expect("sent");
            assert_eq!(
                events.rest().await.end.error.as_deref(),
                Some("signal: terminated")
            );
        }
        assert!(clients.list().await.is_empty());
        let error = refusal(clients.connect(by_tag("nobody")).await).await;
        assert_eq!(error.code, ErrorCode::NotFound);
    });
}

#[test]
fn a_signal_ends_a_process_and_its_children_at_once() {
    run(async |world| {
        let clients = clients(world);
        let mut events = clients
            .start(script("sleep 1000 & echo $!; wait"))
            .await
            .expect("started");
        let pid = events.pid().await;
        let child: u32 = events.until("\n").await.trim().parse().expect("a pid");
        clients
            .signal(pid, Signal::SIGNAL_SIGKILL)
            .await
            .expect("sent");
        assert_eq!(
            events.rest().await.end.error.as_deref(),
            Some("signal: killed")
        );
        eventually("both are gone", async || {
            !world.runs(pid) && !world.runs(child)
        })
        .await;
        assert_eq!(
            clients
                .signal(999_999, Signal::SIGNAL_SIGKILL)
                .await
                .expect_err("unknown")
                .code,
            ErrorCode::NotFound
        );
        assert_eq!(
            clients
                .signal(pid, Signal::SIGNAL_SIGKILL)
                .await
                .expect_err("it has ended")
                .code,
            ErrorCode::NotFound
        );
        let mut events = clients
            .start(program(&["sleep", "1000"]))
            .await
            .expect("started");
        let pid = events.pid().await;
        assert_eq!(
            clients
                .signal(pid, Signal::SIGNAL_UNSPECIFIED)
                .await
                .expect_err("refused")
                .code,
            ErrorCode::Unimplemented
        );
    });
}

#[test]
fn what_was_killed_is_gone_when_the_call_returns() {
    run(async |world| {
        let clients = clients(world);
        for _ in 0..20 {
            let mut events = clients
                .start(program(&["sleep", "1000"]))
                .await
                .expect("started");
            let pid = events.pid().await;
            let kill = || clients.signal(pid, Signal::SIGNAL_SIGKILL);
            kill().await.expect("sent");
            let running: Vec<_> = clients.list().await.iter().map(|p| p.pid).collect();
            assert!(!running.contains(&pid), "{running:?} has {pid}");
            assert_eq!(kill().await.expect_err("dead").code, ErrorCode::NotFound);
        }
    });
}

#[test]
fn a_process_ends_although_a_child_holds_its_output() {
    run(async |world| {
        for codec in CODECS {
            let clients = clients_by(world, codec);
            for child in [
                "sleep 1000",
                "yes >&2",
                "while :; do date >&2; sleep .1; done",
            ] {
                // In its own session, and it holds both pipes.
                let text =
                    format!("setsid sh -c '{child}' & echo $!; seq 100000; echo last >&2; exit 3");
                let began = Instant::now();
                let outcome = clients.run(script(&text)).await;
                assert!(began.elapsed() < Duration::from_secs(20), "it waits");
                assert_eq!((outcome.ends, outcome.end.exit_code), (1, 3));
                let text = String::from_utf8(outcome.stdout).expect("UTF-8");
                let (pid, numbers) = text.split_once('\n').expect("a line");
                assert!(
                    numbers
                        .lines()
                        .eq((1..=100_000).map(|n: u32| n.to_string()))
                );
                let errors = String::from_utf8_lossy(&outcome.stderr);
                assert!(errors.contains("last\n"), "{errors:.200}");
                let child = pid.parse().expect("a PID");
                assert!(world.runs(child), "the child lives on");
                let killed = clients.run(program(&["kill", "-9", "--", &format!("-{pid}")]));
                assert_eq!(killed.await.end.exit_code, 0);
            }
        }
        assert!(clients(world).list().await.is_empty());
    });
}

#[test]
fn a_child_that_lives_on_is_neither_blocked_nor_killed_by_its_output() {
    run(async |world| {
        let clients = clients(world);
        // Without a reader, the child would block after 64 KiB. Without an open pipe, it would be
        // killed.
        let text = "(until [ -e /mnt/work/go ]; do sleep 0.1; done; \
                     seq 100000; seq 100000 >&2; echo > /mnt/work/done) & echo early";
        assert_eq!(clients.sh(text).await, "early\n");
        world.write("/mnt/work/go", "");
        eventually("the child has written everything", async || {
            world.path("/mnt/work/done").exists()
        })
        .await;
    });
}

#[test]
fn what_was_written_before_the_end_is_not_lost_however_much_and_however_slow_the_reader() {
    // All output is in the pipe when the process ends: a process can enlarge its pipe.
    const PROGRAM: &str = "import fcntl, os, subprocess\n\
        subprocess.Popen(['sleep', '1000'], start_new_session=True)\n\
        fcntl.fcntl(1, 1031, 1 << 20)\n\
        os.write(1, b'x' * (1 << 20))\n\
        os._exit(3)";
    run(async |world| {
        let clients = clients(world);
        let mut events = clients
            .start(program(&["python3", "-c", PROGRAM]))
            .await
            .expect("started");
        let pid = events.pid().await;
        // Nothing is read before the process has ended.
        eventually("the process ends", async || !world.runs(pid)).await;
        let outcome = events.rest().await;
        assert_eq!((outcome.ends, outcome.end.exit_code), (1, 3));
        assert_eq!(outcome.stdout.len(), 1 << 20);
        assert!(outcome.stdout.iter().all(|byte| *byte == b'x'));
    });
}

#[test]
fn what_the_last_program_of_a_pipe_prints_belongs_to_the_process() {
    run(async |world| {
        // The shell does not wait for `tee`.
        let request = program(&["/bin/bash", "-c", "exec > >(tee /dev/stderr); echo out"]);
        let outcome = clients(world).run(request).await;
        assert_eq!(
            (outcome.stderr.as_slice(), outcome.ends),
            (&b"out\n"[..], 1)
        );
        assert_eq!(outcome.text(), "out\n");
    });
}

#[test]
fn a_time_limit_kills_the_process_even_if_the_client_has_gone() {
    run(async |world| {
        let clients = clients(world);
        // Long enough for the process to start on a busy machine.
        let time = Duration::from_secs(3);
        let began = Instant::now();
        let events = clients
            .start_with(script("echo out; sleep 1000"), limit(time))
            .await;
        let outcome = events.expect("started").rest().await;
        assert!(began.elapsed() >= time);
        assert_eq!(
            (&outcome.stdout[..], outcome.end.error.as_deref()),
            (&b"out\n"[..], Some("signal: killed"))
        );
        // The stream itself ends with the reason.
        assert_eq!(
            outcome.error.expect("said").code,
            ErrorCode::DeadlineExceeded
        );
        let mut events = clients
            .start_with(program(&["sleep", "1000"]), limit(time))
            .await
            .expect("started");
        let pid = events.pid().await;
        drop(events);
        eventually("it is killed", async || !world.runs(pid)).await;
        // No limit, and a limit that is not reached.
        assert_eq!(
            clients
                .start_with(script("sleep 0.5; echo x"), limit(Duration::ZERO))
                .await
                .expect("started")
                .rest()
                .await
                .text(),
            "x\n"
        );
        let outcome = clients
            .start_with(script("echo x"), limit(Duration::from_secs(100)))
            .await
            .expect("started")
            .rest()
            .await;
        assert_eq!(
            (outcome.error.is_none(), outcome.text().as_str()),
            (true, "x\n")
        );
    });
}

#[test]
fn a_client_that_goes_away_does_not_end_the_process() {
    run(async |world| {
        let clients = clients(world);
        let request = script("trap '' PIPE; while :; do echo tick; sleep 0.05; done");
        let mut events = clients.start(request).await.expect("started");
        let pid = events.pid().await;
        events.until("tick").await;
        drop((events, clients));
        let clients = crate::calls::clients(world);
        let mut again = clients
            .connect(crate::calls::by_pid(pid))
            .await
            .expect("still there");
        again.pid().await;
        again.until("tick\ntick\ntick\n").await;
        assert!(world.runs(pid));
        clients
            .signal(pid, Signal::SIGNAL_SIGKILL)
            .await
            .expect("sent");
    });
}

#[test]
fn silence_is_broken_by_keepalives() {
    run(async |world| {
        let options = crate::calls::header("keepalive-ping-interval", "1");
        let clients = clients(world);
        let mut events = clients
            .start_with(program(&["sleep", "1000"]), options)
            .await
            .expect("started");
        events.pid().await;
        let event = events.any().await.expect("goes on").expect("an event");
        assert!(matches!(
            event,
            wrenn_proto::rpc::process::__buffa::oneof::process_event::Event::Keepalive(_)
        ));
    });
}

#[test]
fn who_writes_for_ever_does_not_keep_the_end_of_who_was_killed() {
    run(async |world| {
        let clients = clients(world);
        for survivor in ["while :; do date; sleep .2; done", "yes"] {
            // In its own session, so that the signal does not reach the child.
            let text = format!("setsid sh -c 'echo survivor; {survivor}' & wait");
            let mut events = clients.start(script(&text)).await.expect("started");
            let pid = events.pid().await;
            events.until("survivor\n").await;
            clients
                .signal(pid, Signal::SIGNAL_SIGKILL)
                .await
                .expect("sent");
            let outcome = tokio::time::timeout(Duration::from_secs(10), events.rest())
                .await
                .expect("it does not wait for it");
            assert_eq!(
                (outcome.ends, outcome.end.error.as_deref()),
                (1, Some("signal: killed"))
            );
        }
    });
}
