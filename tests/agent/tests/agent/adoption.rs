//! Restarts of the agent: sandboxes keep running, and incomplete or lost sandboxes are cleaned up.

use std::{
    fs,
    time::{Duration, Instant},
};

use connectrpc::ErrorCode;
use nix::sys::signal::Signal;
use wrenn_proto::{
    rpc::hostagent::v1::{self as pb, SandboxState},
    supervise::files,
};

use crate::{
    agent::{self, TestAgent, faulty, on_private_host},
    private_host::{self, Footprint},
};

const RUNNING: SandboxState = SandboxState::SANDBOX_STATE_RUNNING;
const ERROR: SandboxState = SandboxState::SANDBOX_STATE_ERROR;

#[test]
fn sandboxes_keep_running_during_an_orderly_restart() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let first = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        let request = pb::CreateSandboxRequest {
            egress: pb::Egress::EGRESS_ALLOW.into(),
            ..agent::request("sb-stay")
        };
        let made = first.create_with(request).await.expect("made");
        let machine = first.machine_pid("sb-stay");
        first.stop().await;
        assert!(agent::is_alive(machine));

        let second = TestAgent::start(data.path()).await;
        let mut found = second.wait_for("sb-stay", RUNNING).await;
        assert!(found.last_active_unix_ms >= made.last_active_unix_ms);
        found.last_active_unix_ms = made.last_active_unix_ms;
        assert_eq!(found, made);
        assert_eq!(second.machine_pid("sb-stay"), machine);
        let done = second.sh("sb-stay", "echo here").await.expect("run");
        assert_eq!(done.stdout, b"here\n");
        second.destroy("sb-stay").await.expect("destroyed");
        assert!(!agent::is_alive(machine));
        assert_eq!(Footprint::now(), before);
        second.stop().await;
    });
}

#[test]
fn sandboxes_survive_a_killed_agent_and_a_loss_meanwhile_is_reported() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let first = TestAgent::start_child(data.path()).await;
        let before = Footprint::now();
        for n in 0..5 {
            first.create(&format!("sb-{n}")).await.expect("made");
        }
        let victim = (first.supervisor_pid("sb-3"), first.machine_pid("sb-3"));
        first.kill().await;
        agent::kill_9(victim.0);

        let second = TestAgent::start_child(data.path()).await;
        assert_eq!(second.list().await.len(), 5);
        for n in [0, 1, 2, 4] {
            let id = format!("sb-{n}");
            second.wait_for(&id, RUNNING).await;
            let done = second.sh(&id, &format!("echo {n}")).await.expect("run");
            assert_eq!(done.stdout, format!("{n}\n").into_bytes());
        }
        // A killed process may take some time to disappear.
        let lost = second.wait_for("sb-3", ERROR).await;
        assert!(
            lost.reason.contains("ended unexpectedly"),
            "{}",
            lost.reason
        );
        agent::until("the lost machine's end", async || {
            (!agent::is_alive(victim.1)).then_some(())
        })
        .await;
        for n in 0..5 {
            second.destroy(&format!("sb-{n}")).await.expect("destroyed");
        }
        assert_eq!(Footprint::now(), before);
        second.kill().await;
    });
}

#[test]
fn create_interrupted_by_a_killed_agent_is_continued_or_undone() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        // The guest does not answer yet; the VM runs.
        let first = TestAgent::start_child(data.path()).await;
        let before = Footprint::now();
        let create = first.create_with(faulty("sb-boots", "silent-guest"));
        let booting = agent::until("a machine", async || {
            first
                .sandbox_dir("sb-boots")
                .join("machine.pid")
                .exists()
                .then_some(())
        });
        tokio::select! {
            _ = create => panic!("the create must not complete"),
            () = booting => {}
        }
        // `ready` follows immediately. Without it, the supervisor counts as incomplete as well.
        agent::until("the sandbox in the list", async || {
            first.find("sb-boots").await
        })
        .await;
        first.kill().await;

        let second = TestAgent::start(data.path()).await;
        let found = second.find("sb-boots").await.expect("known");
        let starting = SandboxState::SANDBOX_STATE_STARTING;
        assert!(
            [Some(starting), Some(ERROR)].contains(&found.state.as_known()),
            "{found:?}"
        );
        second.destroy("sb-boots").await.expect("destroyed");
        assert_eq!(Footprint::now(), before);
        second.stop().await;
    });
}

#[test]
fn orderly_shutdown_undoes_a_create_without_a_vm() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let first = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        let client = first.client.clone();
        let create = tokio::spawn(async move {
            client
                .create_sandbox(faulty("sb-young", "never-ready"))
                .await
        });
        agent::until("a supervisor", async || {
            first
                .sandbox_dir("sb-young")
                .join("machine.pid")
                .exists()
                .then_some(())
        })
        .await;
        let machine = first.machine_pid("sb-young");
        first.stop().await;
        let error = create.await.expect("no panic").expect_err("shut down");
        assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
        assert!(!agent::is_alive(machine));
        assert!(!data.path().join("sandboxes/sb-young").exists());
        assert_eq!(Footprint::now(), before);
    });
}

#[test]
fn incomplete_sandboxes_of_an_earlier_agent_are_removed() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let first = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        first.create("sb-half").await.expect("made");
        let spec = first.spec("sb-half");
        let pids = (
            first.supervisor_pid("sb-half"),
            first.machine_pid("sb-half"),
        );
        first.stop().await;
        // As if the agent had been killed before it wrote the specification. The VM in the cgroup
        // is then a stray process.
        agent::kill_9(pids.0);
        fs::remove_file(data.path().join("sandboxes/sb-half/spec.json")).expect("removed");
        fs::create_dir(data.path().join("sandboxes/sb-empty")).expect("made");
        let torn = data.path().join("sandboxes/sb-torn");
        fs::create_dir(&torn).expect("made");
        fs::write(torn.join("spec.json"), "{\"version\": 1, \"id\": \"sb-t").expect("written");

        let second = TestAgent::start(data.path()).await;
        assert!(second.list().await.is_empty());
        assert_eq!(
            fs::read_dir(data.path().join("sandboxes"))
                .expect("directories")
                .count(),
            0
        );
        assert!(spec.cgroups.iter().all(|dir| !dir.exists()));
        assert!(!agent::is_alive(pids.1));
        assert_eq!(Footprint::now(), before);
        second.stop().await;
    });
}

#[test]
fn sandbox_without_its_network_is_lost() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let first = TestAgent::start(data.path()).await;
        first.create("sb-cut").await.expect("made");
        let machine = first.machine_pid("sb-cut");
        first.stop().await;
        private_host::ip(&["link", "del", "wrenn-v1"]);
        let second = TestAgent::start(data.path()).await;
        let lost = second.wait_for("sb-cut", ERROR).await;
        assert!(
            lost.reason.contains("network link is gone"),
            "{}",
            lost.reason
        );
        agent::until("its machine's end", async || {
            (!agent::is_alive(machine)).then_some(())
        })
        .await;
        second.destroy("sb-cut").await.expect("destroyed");
        second.stop().await;
    });
}

#[test]
fn supervisors_that_hang_hold_up_no_other_sandbox() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let first = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        // More than the number of sandboxes that are examined at the same time.
        let hung: Vec<String> = (0..36).map(|number| format!("sb-h{number}")).collect();
        let others = ["sb-3".to_owned(), "sb-4".to_owned()];
        for id in hung.iter().chain(&others) {
            first.create(id).await.expect("made");
        }
        let pids: Vec<_> = hung.iter().map(|id| first.supervisor_pid(id)).collect();
        first.stop().await;
        for pid in &pids {
            agent::signal(*pid, Signal::SIGSTOP);
        }

        // Each of them takes ten seconds to be given up.
        let began = Instant::now();
        let second = TestAgent::start(data.path()).await;
        assert_eq!(second.list().await.len(), hung.len() + others.len());
        for id in &others {
            let done = second.sh(id, "echo here").await.expect("run");
            assert_eq!(done.stdout, b"here\n");
        }
        let took = began.elapsed();
        assert!(took < Duration::from_secs(5), "{took:?}");
        for id in &hung {
            let found = second.find(id).await.expect("known");
            assert_ne!(found.state.as_known(), Some(RUNNING), "{found:?}");
        }
        // It can be destroyed, and the others are adopted when they answer.
        second.destroy(&hung[0]).await.expect("destroyed");
        assert!(!agent::is_alive(pids[0]));
        for pid in &pids[1..] {
            agent::signal(*pid, Signal::SIGCONT);
        }
        for id in &hung[1..] {
            second.wait_for(id, RUNNING).await;
            let done = second.sh(id, "echo here").await.expect("run");
            assert_eq!(done.stdout, b"here\n");
        }
        for id in hung[1..].iter().chain(&others) {
            second.destroy(id).await.expect("destroyed");
        }
        assert_eq!(Footprint::now(), before);
        second.stop().await;
    });
}

#[test]
fn supervisor_that_cannot_be_reached_is_tried_again() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let first = TestAgent::start(data.path()).await;
        first.create("sb-far").await.expect("made");
        let machine = first.machine_pid("sb-far");
        let socket = first.sandbox_dir("sb-far").join(files::SOCKET);
        let aside = first.sandbox_dir("sb-far").join("aside");
        first.stop().await;
        // A connection fails for another reason than a supervisor that has ended.
        fs::rename(&socket, &aside).expect("moved");
        std::os::unix::fs::symlink(&socket, &socket).expect("linked");

        let second = TestAgent::start(data.path()).await;
        let starting = agent::until("a warning", async || {
            let found = second.find("sb-far").await?;
            (!found.warning.is_empty()).then_some(found)
        })
        .await;
        let state = SandboxState::SANDBOX_STATE_STARTING;
        assert_eq!(starting.state.as_known(), Some(state), "{starting:?}");
        assert!(agent::is_alive(machine), "nothing is freed");
        fs::remove_file(&socket).expect("it is there");
        fs::rename(&aside, &socket).expect("moved");
        let found = second.wait_for("sb-far", RUNNING).await;
        assert_eq!(found.warning, "");
        let done = second.sh("sb-far", "echo here").await.expect("run");
        assert_eq!(done.stdout, b"here\n");
        second.destroy("sb-far").await.expect("destroyed");
        second.stop().await;
    });
}

#[test]
fn second_agent_of_a_data_directory_is_rejected() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let first = TestAgent::start(data.path()).await;
        let again = wrenn_agent::serve(
            agent::config(data.path()),
            |_| panic!("a second agent serves"),
            tokio_util::sync::CancellationToken::new(),
        );
        let error = again.await.expect_err("in use");
        assert!(
            matches!(error, wrenn_agent::AgentError::InUse(_)),
            "{error}"
        );
        assert!(
            error.to_string().contains("in use by another host agent"),
            "{error}"
        );
        first.stop().await;
    });
}

#[test]
fn two_agents_on_one_host_do_not_affect_each_other() {
    on_private_host(async || {
        let data = (
            tempfile::tempdir().expect("one"),
            tempfile::tempdir().expect("two"),
        );
        let ours = TestAgent::start(data.0.path()).await;
        let theirs = TestAgent::start(data.1.path()).await;
        // The same ID on both agents: all resources must differ.
        let (a, b) = tokio::join!(ours.create("sb-same"), theirs.create("sb-same"));
        assert_ne!(a.expect("made").host_ip, b.expect("made").host_ip);
        ours.stop().await;
        let ours = TestAgent::start(data.0.path()).await;
        ours.destroy("sb-same").await.expect("destroyed");
        let done = theirs.sh("sb-same", "echo unharmed").await.expect("run");
        assert_eq!(done.stdout, b"unharmed\n");
        theirs.destroy("sb-same").await.expect("destroyed");
        ours.stop().await;
        theirs.stop().await;
    });
}
