//! Restarts of the agent: sandboxes keep running, and incomplete or lost sandboxes are cleaned up.

use std::fs;

use connectrpc::ErrorCode;
use wrenn_proto::rpc::hostagent::v1::{self as pb, SandboxState};

use crate::{
    agent::{self, TestAgent, faulty, on_private_host},
    private_host::{self, Footprint},
};

const RUNNING: SandboxState = SandboxState::SANDBOX_STATE_RUNNING;
const ERROR: SandboxState = SandboxState::SANDBOX_STATE_ERROR;

#[test]
fn sandboxes_run_on_while_the_agent_is_restarted_in_order() {
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
fn sandboxes_run_on_when_the_agent_is_killed_and_one_that_died_meanwhile_is_told() {
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
fn a_create_that_the_agents_end_cut_short_goes_on_or_is_undone() {
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
fn an_agent_that_ends_in_order_undoes_a_create_that_has_no_machine_yet() {
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
fn what_an_earlier_agent_left_half_made_is_removed() {
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
fn a_sandbox_whose_network_was_removed_is_told_as_lost() {
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
fn one_data_directory_has_one_agent() {
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
fn two_agents_on_one_host_leave_each_others_sandboxes_alone() {
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
