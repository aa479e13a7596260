//! Failures of a pause, a snapshot and a resume, and the start of an agent that finds their
//! remains: the rows of the tables in `sandbox/pause.rs` and `sandbox/adopt.rs`.

use std::{fs, io};

use nix::mount::{MsFlags, mount, umount};
use wrenn_proto::rpc::hostagent::v1::{self as pb, SandboxState};

use crate::agent::{self, TestAgent, on_private_host, until};

const ID: &str = "sb-pause";
const RUNNING: SandboxState = SandboxState::SANDBOX_STATE_RUNNING;
const PAUSING: SandboxState = SandboxState::SANDBOX_STATE_PAUSING;
const PAUSED: SandboxState = SandboxState::SANDBOX_STATE_PAUSED;

/// Makes the sandbox's snapshots fail in this way from now on. An empty string ends that.
fn set_fault(agent: &TestAgent, fault: &str) {
    fs::write(agent.sandbox_dir(ID).join("fault"), fault).expect("written");
}

/// Returns the calls that reached the guest, `prepare` and `recover`, in order.
fn calls(agent: &TestAgent) -> Vec<String> {
    let log = fs::read_to_string(agent.sandbox_dir(ID).join("calls.log")).unwrap_or_default();
    let words = log.lines().filter_map(|line| line.split(' ').next());
    words
        .filter(|word| ["prepare", "recover"].contains(word))
        .map(str::to_owned)
        .collect()
}

async fn runs(agent: &TestAgent) {
    let found = agent.find(ID).await.expect("it is there");
    assert_eq!(found.state.as_known(), Some(RUNNING), "{found:?}");
    let done = agent.sh(ID, "echo here").await.expect("run");
    assert_eq!(done.stdout, b"here\n");
}

/// Checks that the sandbox can be snapshotted, paused and resumed.
async fn is_usable(agent: &TestAgent, name: &str) {
    agent.snapshot(ID, name).await.expect("snapshot taken");
    runs(agent).await;
    agent.pause(ID).await.expect("paused");
    agent.resume(ID).await.expect("resumed");
    runs(agent).await;
}

const FAULTS: [&str; 5] = [
    "reject-prepare",
    "reject-snapshot",
    "fail-after-switch",
    "lose-answer",
    "unwritable-store",
];

#[test]
fn sandbox_keeps_running_after_a_failed_pause_or_snapshot() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        for (n, fault) in FAULTS.into_iter().enumerate() {
            for pauses in [true, false] {
                agent.create(ID).await.expect("made");
                set_fault(&agent, fault);
                let before = calls(&agent).len();
                let failed = if pauses {
                    agent.pause(ID).await
                } else {
                    agent.snapshot(ID, "never").await
                };
                failed.expect_err(fault);
                runs(&agent).await;
                let warning = agent.find(ID).await.expect("it is there").warning;
                assert!(!warning.is_empty(), "{fault}: no warning");
                let after = calls(&agent).split_off(before);
                assert_eq!(
                    after.last().map(String::as_str),
                    Some("recover"),
                    "{fault}: {after:?}"
                );
                set_fault(&agent, "");
                is_usable(&agent, &format!("after-{n}-{pauses}")).await;
                agent.destroy(ID).await.expect("destroyed");
            }
        }
        agent.stop().await;
    });
}

#[test]
fn vm_keeps_its_new_disk_file_if_the_snapshot_fails_later() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        let disks = || {
            let mut names: Vec<_> = fs::read_dir(agent.sandbox_dir(ID))
                .expect("a directory")
                .map(|entry| entry.expect("an entry").file_name())
                .filter_map(|name| name.into_string().ok())
                .filter(|name| name.ends_with(".qcow2"))
                .collect();
            names.sort();
            names
        };
        let one = disks();
        set_fault(&agent, "reject-snapshot");
        agent.snapshot(ID, "never").await.expect_err("refused");
        assert_eq!(disks(), one, "the unused file is removed");
        set_fault(&agent, "fail-after-switch");
        agent.snapshot(ID, "never").await.expect_err("refused");
        assert_eq!(disks().len(), 2, "{:?}", disks());
        agent.snapshot(ID, "never").await.expect_err("refused");
        assert_eq!(disks().len(), 3, "a name is used once: {:?}", disks());
        set_fault(&agent, "");
        is_usable(&agent, "whole").await;
        agent.destroy(ID).await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn recover_is_repeated_until_the_guest_accepts_it() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        let before = calls(&agent).len();
        set_fault(&agent, "reject-recover");
        agent.snapshot(ID, "taken").await.expect("snapshot taken");
        assert_eq!(calls(&agent).split_off(before), ["prepare"]);
        set_fault(&agent, "");
        until("it recovers", async || {
            (calls(&agent).split_off(before) == ["prepare", "recover"]).then_some(())
        })
        .await;
        agent.destroy(ID).await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn vm_continues_after_the_agent_died_during_its_snapshot() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let first = TestAgent::start_child(data.path()).await;
        first.create(ID).await.expect("made");
        set_fault(&first, "slow-snapshot");
        let snapshotting = first.sandbox_dir(ID).join("snapshotting");
        tokio::select! {
            paused = first.pause(ID) => panic!("the pause must not complete: {paused:?}"),
            () = until("it is being written", async || snapshotting.exists().then_some(())) => {}
        }
        first.kill().await;

        let second = TestAgent::start(data.path()).await;
        second.wait_for(ID, PAUSING).await;
        set_fault(&second, "");
        fs::remove_file(snapshotting).expect("it is there");
        second.wait_for(ID, RUNNING).await;
        is_usable(&second, "whole").await;
        second.destroy(ID).await.expect("destroyed");
        second.stop().await;
    });
}

#[test]
fn guest_that_was_prepared_for_a_pause_is_recovered_by_the_next_agent() {
    const PREPARED: &str = "self@agent.snapshot.prepared";
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        agent.stop().await;
        let dying = TestAgent::start_child_with(data.path(), PREPARED).await;
        dying.wait_for(ID, RUNNING).await;
        dying.pause(ID).await.expect_err("no answer");
        dying.dies(PREPARED).await;

        let agent = TestAgent::start(data.path()).await;
        until("it recovers", async || {
            (calls(&agent).last()? == "recover").then_some(())
        })
        .await;
        is_usable(&agent, "whole").await;
        agent.destroy(ID).await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn lost_vm_is_paused_at_its_last_snapshot_even_if_nothing_can_be_written() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        agent.snapshot(ID, "good").await.expect("snapshot taken");
        // A mount point can be read, but not replaced.
        let record = agent.sandbox_dir(ID).join("snapshot.json");
        let none = None::<&str>;
        mount(Some(&record), &record, none, MsFlags::MS_BIND, none).expect("mounted");
        agent::kill_9(agent.supervisor_pid(ID));
        let lost = agent.wait_for(ID, PAUSED).await;
        assert!(
            lost.warning.contains("paused at its last snapshot"),
            "{lost:?}"
        );
        umount(&record).expect("it is mounted");
        agent.resume(ID).await.expect("resumed");
        runs(&agent).await;
        agent.destroy(ID).await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn unreadable_sandbox_is_never_removed() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        agent.pause(ID).await.expect("paused");
        let spec = agent.sandbox_dir(ID).join("spec.json");
        let aside = agent.sandbox_dir(ID).join("aside");
        agent.stop().await;

        // The read fails for another reason than a missing file.
        fs::rename(&spec, &aside).expect("moved");
        fs::create_dir(&spec).expect("made");
        let error = TestAgent::refusal(data.path()).await;
        assert!(error.contains("spec.json"), "{error}");
        fs::remove_dir(&spec).expect("it is there");

        // The file exists and is invalid.
        fs::write(&spec, "{").expect("written");
        let agent = TestAgent::start(data.path()).await;
        assert!(agent.find(ID).await.is_none());
        agent.stop().await;

        fs::rename(&aside, &spec).expect("moved");
        let agent = TestAgent::start(data.path()).await;
        // Its actor examines it when the agent serves already.
        agent.wait_for(ID, PAUSED).await;
        agent.resume(ID).await.expect("resumed");
        runs(&agent).await;
        agent.destroy(ID).await.expect("destroyed");
        agent.stop().await;
    });
}

/// Returns the templates that are snapshots: name and memory, which is 0 for a damaged one.
async fn named(agent: &TestAgent) -> Vec<(String, u32)> {
    let host = agent.client.get_host(pb::GetHostRequest::default()).await;
    let templates = host.expect("a host").into_owned().templates;
    let snapshots = templates.into_iter().filter(|template| {
        template.kind.as_known() == Some(pb::TemplateKind::TEMPLATE_KIND_SNAPSHOT)
    });
    snapshots.map(|t| (t.name, t.memory_mb)).collect()
}

#[test]
fn named_snapshots_are_listed_from_memory() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        assert!(named(&agent).await.is_empty());
        for name in ["one", "two"] {
            agent.snapshot(ID, name).await.expect("snapshot taken");
        }
        let again = pb::CreateSnapshotRequest {
            id: ID.to_owned(),
            name: "one".to_owned(),
            overwrite: true,
            ..Default::default()
        };
        agent.client.create_snapshot(again).await.expect("replaced");
        let list = named(&agent).await;
        assert_eq!(list.len(), 2);
        assert!(list.iter().all(|(_, memory_mb)| *memory_mb > 0), "{list:?}");
        let delete = pb::DeleteSnapshotRequest {
            name: "two".to_owned(),
            force: true,
            ..Default::default()
        };
        agent.client.delete_snapshot(delete).await.expect("deleted");
        assert_eq!(named(&agent).await, list[..1]);
        // A header that is damaged later is not read again until the next start.
        for entry in fs::read_dir(data.path().join("snapshots/snapshots")).expect("a store") {
            let header = entry.expect("an entry").path().join("header");
            // The snapshots that were replaced or deleted are being removed.
            match fs::write(header, "damaged") {
                Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("{error}"),
                _ => {}
            }
        }
        assert_eq!(named(&agent).await, list[..1]);
        agent.stop().await;
        let agent = TestAgent::start(data.path()).await;
        assert_eq!(named(&agent).await, [("one".to_owned(), 0)]);
        agent.destroy(ID).await.expect("destroyed");
        agent.stop().await;
    });
}
