//! Resume of a sandbox from its disk alone, and removal of names of snapshots that are in use.

use std::{fs, path::Path};

use connectrpc::{ConnectError, ErrorCode};
use wrenn_proto::rpc::hostagent::v1::{self as pb, SandboxState};

use crate::{
    agent::{self, TestAgent, on_private_host},
    private_host::Footprint,
};

async fn resume(
    agent: &TestAgent,
    id: &str,
    cold_boot: bool,
) -> Result<pb::SandboxInfo, ConnectError> {
    let request = pb::ResumeSandboxRequest {
        id: id.to_owned(),
        cold_boot,
        ..Default::default()
    };
    let answer = agent.client.resume_sandbox(request).await?;
    let sandbox = answer.into_owned().sandbox.into_option();
    Ok(sandbox.expect("a sandbox"))
}

async fn delete(agent: &TestAgent, name: &str, force: bool) -> Result<(), ConnectError> {
    let request = pb::DeleteSnapshotRequest {
        name: name.to_owned(),
        force,
        ..Default::default()
    };
    agent.client.delete_snapshot(request).await.map(drop)
}

/// Returns the guest calls since the previous check.
fn calls(agent: &TestAgent, id: &str) -> Vec<String> {
    let path = agent.sandbox_dir(id).join("calls.log");
    let text = fs::read_to_string(&path).unwrap_or_default();
    let _ = fs::remove_file(path);
    text.lines()
        .map(|line| line.split(' ').next().unwrap_or_default().to_owned())
        .collect()
}

fn snapshots(data: &Path) -> usize {
    fs::read_dir(data.join("snapshots/snapshots")).map_or(0, |entries| entries.count())
}

#[test]
fn cold_boot_uses_the_disk_and_discards_the_memory() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        let request = pb::CreateSandboxRequest {
            egress: pb::Egress::EGRESS_ALLOW.into(),
            ..agent::request("sb-1")
        };
        let made = agent.create_with(request).await.expect("made");
        agent.pause("sb-1").await.expect("paused");
        calls(&agent, "sb-1");
        let booted = resume(&agent, "sb-1", true).await.expect("booted");
        assert_eq!(
            booted.state.as_known(),
            Some(SandboxState::SANDBOX_STATE_RUNNING)
        );
        assert_eq!(
            (&booted.id, &booted.envd_token),
            (&made.id, &made.envd_token)
        );
        assert_eq!(booted.egress, made.egress);
        let spec = agent.spec("sb-1");
        assert!(spec.restore.is_none());
        assert_eq!(
            spec.disk_layers.len(),
            1,
            "it is based on the snapshot's disk"
        );
        // A guest that boots receives all settings, as at a create.
        assert_eq!(calls(&agent, "sb-1"), ["init", "recover"]);

        // The next agent finds it running. It can be paused and resumed like any other sandbox.
        agent.stop().await;
        let agent = TestAgent::start(data.path()).await;
        agent
            .wait_for("sb-1", SandboxState::SANDBOX_STATE_RUNNING)
            .await;
        agent.pause("sb-1").await.expect("paused");
        calls(&agent, "sb-1");
        resume(&agent, "sb-1", false).await.expect("resumed");
        assert_eq!(agent.spec("sb-1").disk_layers.len(), 2);
        assert!(agent.spec("sb-1").restore.is_some());
        assert_eq!(calls(&agent, "sb-1"), ["recover"]);
        // A running sandbox is left alone.
        resume(&agent, "sb-1", true).await.expect("runs");
        assert!(agent.spec("sb-1").restore.is_some());
        agent.destroy("sb-1").await.expect("destroyed");
        assert_eq!(Footprint::now(), before);
        agent.stop().await;
    });
}

#[test]
fn sandbox_without_its_memory_files_can_be_booted() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-1").await.expect("made");
        agent.pause("sb-1").await.expect("paused");
        for diff in fs::read_dir(data.path().join("snapshots/memory")).expect("memory") {
            fs::remove_file(diff.expect("a file").path()).expect("removed");
        }
        let error = resume(&agent, "sb-1", false).await.expect_err("damaged");
        assert_eq!(error.code, ErrorCode::Internal);
        resume(&agent, "sb-1", true).await.expect("booted");
        let done = agent.sh("sb-1", "echo here").await.expect("run");
        assert_eq!(done.stdout, b"here\n");
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn failed_cold_boot_keeps_the_sandbox_paused_with_its_memory() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-1").await.expect("made");
        agent.pause("sb-1").await.expect("paused");
        let path = agent.sandbox_dir("sb-1").join("spec.json");
        let whole = agent.spec("sb-1");
        for fault in ["die-at-start", "die-in-boot", "silent-guest", "reject-init"] {
            let mut spec = whole.clone();
            spec.envs.insert("FAKE".to_owned(), fault.to_owned());
            fs::write(&path, serde_json::to_vec(&spec).expect("JSON")).expect("written");
            resume(&agent, "sb-1", true).await.expect_err("no guest");
            let found = agent.find("sb-1").await.expect("listed");
            assert_eq!(
                found.state.as_known(),
                Some(SandboxState::SANDBOX_STATE_PAUSED),
                "{fault}"
            );
            assert!(
                !found.warning.is_empty() && found.host_ip.is_empty(),
                "{fault}"
            );
        }
        fs::write(&path, serde_json::to_vec(&whole).expect("JSON")).expect("written");
        calls(&agent, "sb-1");
        resume(&agent, "sb-1", false).await.expect("resumed");
        assert_eq!(calls(&agent, "sb-1"), ["recover"], "from its memory");
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn lost_vm_after_a_cold_boot_is_paused_at_its_last_snapshot() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-1").await.expect("made");
        agent.pause("sb-1").await.expect("paused");
        resume(&agent, "sb-1", true).await.expect("booted");
        agent::kill_9(agent.supervisor_pid("sb-1"));
        let lost = agent
            .wait_for("sb-1", SandboxState::SANDBOX_STATE_PAUSED)
            .await;
        assert!(lost.warning.contains("was lost"), "{}", lost.warning);
        resume(&agent, "sb-1", false).await.expect("resumed");
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

/// Unreferenced snapshots are removed in the background. An agent that exits in the middle of that
/// drops all of its references.
#[test]
fn paused_sandbox_survives_restarts_of_the_agent() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let mut agent = TestAgent::start(data.path()).await;
        agent.create("sb-1").await.expect("made");
        for _ in 0..10 {
            agent.pause("sb-1").await.expect("paused");
            agent.stop().await;
            agent = TestAgent::start(data.path()).await;
            resume(&agent, "sb-1", false).await.expect("resumed");
        }
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn forced_delete_of_a_name_keeps_the_snapshots_of_sandboxes() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-origin").await.expect("made");
        agent
            .snapshot("sb-origin", "named")
            .await
            .expect("snapshot taken");
        agent.destroy("sb-origin").await.expect("destroyed");
        let request = |id| pb::CreateSandboxRequest {
            template: "named".to_owned(),
            ..agent::request(id)
        };
        agent.create_with(request("sb-runs")).await.expect("made");
        agent.create_with(request("sb-rests")).await.expect("made");
        agent.pause("sb-rests").await.expect("paused");
        let error = delete(&agent, "named", false).await.expect_err("in use");
        assert_eq!(error.code, ErrorCode::FailedPrecondition);
        delete(&agent, "named", true).await.expect("forced");
        for force in [false, true] {
            let error = delete(&agent, "named", force).await.expect_err("gone");
            assert_eq!(error.code, ErrorCode::NotFound);
        }
        let error = agent
            .create_with(request("sb-late"))
            .await
            .expect_err("gone");
        assert_eq!(error.code, ErrorCode::NotFound);

        // The same holds after a restart: the next agent reads the dependencies from the sandboxes'
        // directories.
        agent.stop().await;
        let agent = TestAgent::start(data.path()).await;
        agent.sh("sb-runs", "true").await.expect("run");
        resume(&agent, "sb-rests", false).await.expect("resumed");
        agent.pause("sb-runs").await.expect("paused");
        resume(&agent, "sb-runs", false).await.expect("resumed");
        agent.destroy("sb-runs").await.expect("destroyed");
        agent.destroy("sb-rests").await.expect("destroyed");
        agent::until("all is collected", async || {
            (snapshots(data.path()) == 0).then_some(())
        })
        .await;
        agent.stop().await;
    });
}
