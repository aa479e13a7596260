//! Snapshots that a VMM of another version saved.

use std::{fs, path::Path};

use connectrpc::{ConnectError, ErrorCode};
use wrenn_proto::rpc::hostagent::v1::{self as pb, SandboxState};

use crate::agent::{self, TestAgent, on_private_host};

/// Changes the recorded version of the VMM in all snapshots.
fn set_vmm(data: &Path, change: impl Fn(&str) -> String) {
    for entry in fs::read_dir(data.join("snapshots/snapshots")).expect("snapshots") {
        let path = entry.expect("an entry").path().join("manifest.json");
        let text = fs::read_to_string(&path).expect("a manifest");
        let mut manifest: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let version = &mut manifest["requires"]["vmm"]["version"];
        let vmm = change(&format!("qemu {}", version.as_str().expect("a version")));
        *version = vmm.trim_start_matches("qemu ").into();
        fs::write(&path, manifest.to_string()).expect("written");
    }
}

async fn boot(agent: &TestAgent, id: &str) -> Result<(), ConnectError> {
    let request = pb::ResumeSandboxRequest {
        id: id.to_owned(),
        cold_boot: true,
        ..Default::default()
    };
    agent.client.resume_sandbox(request).await.map(drop)
}

#[test]
fn snapshot_of_another_release_of_the_series_is_restored() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-1").await.expect("made");
        agent.pause("sb-1").await.expect("paused");
        set_vmm(data.path(), |vmm| {
            let (series, _) = vmm.rsplit_once('.').expect("three numbers");
            format!("{series}.1")
        });
        agent.resume("sb-1").await.expect("resumed");
        let spec = agent.spec("sb-1");
        let restore = spec.restore.expect("restored");
        // The supervisor checks it against the VMM that it starts.
        assert!(restore.vmm.ends_with(".1"), "{}", restore.vmm);
        assert!(spec.machine.is_some());
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn sandbox_whose_memory_cannot_be_loaded_says_so_and_boots_on_request() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-1").await.expect("made");
        agent
            .snapshot("sb-1", "named")
            .await
            .expect("snapshot taken");
        agent.pause("sb-1").await.expect("paused");
        set_vmm(data.path(), |_| "qemu 99.1.3".to_owned());
        let error = agent.resume("sb-1").await.expect_err("not loaded");
        assert_eq!(error.code, ErrorCode::FailedPrecondition);
        let message = error.message.unwrap_or_default();
        for part in ["qemu 99.1.3", "`memory` false"] {
            assert!(message.contains(part), "{message}");
        }
        let request = pb::CreateSandboxRequest {
            template: "named".to_owned(),
            ..agent::request("sb-2")
        };
        let error = agent.create_with(request).await.expect_err("not loaded");
        assert_eq!(error.code, ErrorCode::FailedPrecondition);

        // The next agent knows it before a client tries.
        agent.stop().await;
        let agent = TestAgent::start(data.path()).await;
        let found = agent
            .wait_for("sb-1", SandboxState::SANDBOX_STATE_PAUSED)
            .await;
        assert!(found.warning.contains("qemu 99.1.3"), "{}", found.warning);
        boot(&agent, "sb-1").await.expect("booted");
        assert!(agent.spec("sb-1").restore.is_none());
        let found = agent.find("sb-1").await.expect("listed");
        assert_eq!(found.warning, "");
        agent.pause("sb-1").await.expect("paused");
        agent.resume("sb-1").await.expect("resumed");
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}
