//! Data directory of release 0.1.0 (commit 95e2493), frozen in `fixtures/data-dir-0.1.0.tar.gz`.
//!
//! Written by the agent of that release with the stand-ins of its tests, in
//! `/run/wrenn-0.1.0`, a path that its files contain:
//!
//! | sandbox | state |
//! |---|---|
//! | `sb-paused` | created, snapshot `named` taken, paused, resumed and paused again |
//! | `sb-saved` | running, with the snapshot `other`; agent, supervisor and VM then ended |
//! | `sb-lost` | running, without a snapshot; agent, supervisor and VM then ended |

use std::{fs, path::Path};

use wrenn_proto::{
    machine::{MachineProfile, VmmKind},
    rpc::hostagent::v1::{self as pb, SandboxState},
};

use crate::{
    agent::{self, TestAgent, on_private_host},
    private_host::run,
};

const DATA_DIR: &str = "/run/wrenn-0.1.0";
const FIXTURE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/fixtures/data-dir-0.1.0.tar.gz"
);
const RUNNING: SandboxState = SandboxState::SANDBOX_STATE_RUNNING;
const PAUSED: SandboxState = SandboxState::SANDBOX_STATE_PAUSED;
const ERROR: SandboxState = SandboxState::SANDBOX_STATE_ERROR;

/// Unpacks the data directory, and starts an agent of this release on it.
async fn start() -> TestAgent {
    let dir = Path::new(DATA_DIR);
    fs::create_dir(dir).expect("a private /run");
    run("tar", &["-xzf", FIXTURE, "-C", DATA_DIR]);
    // The image that its snapshots depend on.
    fs::write(dir.join("image"), vec![0; 1024 * 1024]).expect("written");
    // The state of a VM is restored by the series of QEMU that saved it only. Here, it is the
    // version of this host.
    let version = run("qemu-system-x86_64", &["--version"]);
    let version = version.split_whitespace().nth(3).expect("a version");
    for entry in fs::read_dir(dir.join("snapshots/snapshots")).expect("a directory") {
        let path = entry.expect("an entry").path().join("manifest.json");
        let text = fs::read_to_string(&path).expect("a manifest");
        let mut manifest: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        manifest["vmm"] = format!("qemu {version}").into();
        fs::write(&path, manifest.to_string()).expect("written");
    }
    TestAgent::start(dir).await
}

async fn resume(agent: &TestAgent, id: &str) {
    agent.resume(id).await.expect("resumed");
    agent.wait_for(id, RUNNING).await;
}

async fn pause(agent: &TestAgent, id: &str) {
    agent.pause(id).await.expect("paused");
    agent.wait_for(id, PAUSED).await;
}

#[test]
fn a_paused_sandbox_of_release_0_1_0_is_resumed_paused_and_destroyed() {
    on_private_host(async || {
        let agent = start().await;
        let found = agent.wait_for("sb-paused", PAUSED).await;
        assert_eq!((found.vcpus, found.memory_mb), (1, 256), "{found:?}");
        assert_eq!(found.template, "minimal");
        assert!(found.installation_id.is_empty() && !found.envd_token.is_empty());
        resume(&agent, "sb-paused").await;
        let spec = agent.spec("sb-paused");
        assert_eq!(spec.envs["COLOUR"], "green");
        assert_eq!(spec.envd_token, found.envd_token);
        let done = agent.sh("sb-paused", "echo here").await.expect("run");
        assert_eq!(done.stdout, b"here\n");
        pause(&agent, "sb-paused").await;
        resume(&agent, "sb-paused").await;
        agent.destroy("sb-paused").await.expect("destroyed");
        agent.stop().await;
    });
}

/// The state of a VM is restored with the CPU model and the devices that it was saved with. Release
/// 0.1.0 did not record them.
#[test]
fn a_sandbox_of_release_0_1_0_keeps_its_hardware_until_it_boots() {
    const OLD: &str = "Nehalem-v1,+arat";
    on_private_host(async || {
        let agent = start().await;
        let id = "sb-paused";
        assert_eq!(agent.wait_for(id, PAUSED).await.cpu, "");
        for _ in 0..2 {
            resume(&agent, id).await;
            assert_eq!(agent.spec(id).cpu().as_str(), OLD);
            assert_eq!(agent.spec(id).profile(), MachineProfile::first());
            assert_eq!(agent.wait_for(id, RUNNING).await.cpu, OLD);
            pause(&agent, id).await;
        }
        let request = pb::ResumeSandboxRequest {
            id: id.to_owned(),
            cold_boot: true,
            ..Default::default()
        };
        agent.client.resume_sandbox(request).await.expect("booted");
        let host = agent.client.get_host(pb::GetHostRequest::default()).await;
        let current = host.expect("a host").into_owned().cpu;
        assert_ne!(current, OLD);
        assert_eq!(
            agent.spec(id).profile(),
            MachineProfile::current(VmmKind::Qemu)
        );
        assert_eq!(agent.wait_for(id, RUNNING).await.cpu, current);
        agent.destroy(id).await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn lost_sandboxes_of_release_0_1_0_are_paused_at_their_snapshot_or_in_error() {
    on_private_host(async || {
        let agent = start().await;
        let saved = agent.wait_for("sb-saved", PAUSED).await;
        assert!(!saved.warning.is_empty(), "{saved:?}");
        resume(&agent, "sb-saved").await;
        let lost = agent.wait_for("sb-lost", ERROR).await;
        assert!(!lost.reason.is_empty(), "{lost:?}");
        for id in ["sb-saved", "sb-lost"] {
            agent.destroy(id).await.expect("destroyed");
        }
        agent.stop().await;
    });
}

#[test]
fn the_snapshots_of_release_0_1_0_are_templates_until_they_are_deleted() {
    on_private_host(async || {
        let agent = start().await;
        let host = agent.client.get_host(pb::GetHostRequest::default()).await;
        let host = host.expect("a host").into_owned();
        let names: Vec<_> = host.templates.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["minimal", "named", "other"]);
        let request = pb::CreateSandboxRequest {
            template: "named".to_owned(),
            ..agent::request("sb-copy")
        };
        agent.create_with(request).await.expect("created");
        let done = agent.sh("sb-copy", "echo copy").await.expect("run");
        assert_eq!(done.stdout, b"copy\n");
        agent.destroy("sb-copy").await.expect("destroyed");
        for name in ["named", "other"] {
            let request = pb::DeleteSnapshotRequest {
                name: name.to_owned(),
                force: true,
                ..Default::default()
            };
            agent
                .client
                .delete_snapshot(request)
                .await
                .expect("deleted");
        }
        // The sandboxes keep what they depend on.
        resume(&agent, "sb-paused").await;
        agent.destroy("sb-paused").await.expect("destroyed");
        agent.stop().await;
    });
}
