//! Data directories that were moved, with their image directories: paused sandboxes and snapshots
//! stay usable.

use std::{fs, path::Path};

use wrenn_proto::rpc::hostagent::v1::{self as pb, SandboxState};

use crate::agent::{self, TestAgent, on_private_host};

const PAUSED: SandboxState = SandboxState::SANDBOX_STATE_PAUSED;

/// Creates a data directory with the paused sandbox `sb-1` and the snapshot `named`.
async fn make(dir: &Path) {
    fs::create_dir(dir).expect("created");
    let agent = TestAgent::start(dir).await;
    agent.create("sb-1").await.expect("created");
    let request = pb::CreateSnapshotRequest {
        id: "sb-1".to_owned(),
        name: "named".to_owned(),
        ..Default::default()
    };
    let made = agent.client.create_snapshot(request).await;
    made.expect("a snapshot");
    agent.pause("sb-1").await.expect("paused");
    agent.stop().await;
}

/// Uses everything in a data directory. All files that are used are in it.
async fn use_all(dir: &Path) {
    let is_here = |path: &Path| assert!(path.starts_with(dir) && path.exists(), "{path:?}");
    let agent = TestAgent::start(dir).await;
    agent.wait_for("sb-1", PAUSED).await;
    for cold_boot in [false, true] {
        let request = pb::ResumeSandboxRequest {
            id: "sb-1".to_owned(),
            cold_boot,
            ..Default::default()
        };
        agent.client.resume_sandbox(request).await.expect("resumed");
        let spec = agent.spec("sb-1");
        for path in [&spec.kernel, &spec.initrd, &spec.base_disk] {
            is_here(path);
        }
        spec.disk_layers.iter().for_each(|layer| is_here(layer));
        agent.pause("sb-1").await.expect("paused");
    }
    let request = pb::CreateSandboxRequest {
        template: "named".to_owned(),
        ..agent::request("sb-2")
    };
    agent.create_with(request).await.expect("created");
    is_here(&agent.spec("sb-2").base_disk);
    agent.destroy("sb-2").await.expect("destroyed");
    agent.stop().await;
}

/// Manifests in the data directory, as JSON.
fn manifests(dir: &Path) -> Vec<(std::path::PathBuf, serde_json::Value)> {
    let all = fs::read_dir(dir.join("snapshots/snapshots")).expect("a directory");
    let paths = all.map(|entry| entry.expect("an entry").path().join("manifest.json"));
    let read = |path: &Path| serde_json::from_slice(&fs::read(path).expect("a manifest"));
    paths
        .map(|path| (path.clone(), read(&path).expect("JSON")))
        .collect()
}

#[test]
fn sandboxes_and_snapshots_are_usable_after_a_move() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let (first, second) = (data.path().join("first"), data.path().join("second"));
        make(&first).await;
        let found = manifests(&first);
        assert!(found.len() >= 2, "{found:?}");
        for (_, manifest) in found {
            assert_eq!(manifest["base_disk"], "rootfs/key/rootfs.ext4");
        }
        fs::rename(&first, &second).expect("moved");
        use_all(&second).await;
    });
}

/// Manifests of release 0.1.0 have absolute paths.
#[test]
fn snapshots_of_release_0_1_0_are_usable_after_a_move() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let (first, second) = (data.path().join("first"), data.path().join("second"));
        make(&first).await;
        for (path, mut manifest) in manifests(&first) {
            for file in ["kernel", "initrd", "base_disk"] {
                let name = manifest[file].as_str().expect("a name");
                let path = first.join("images").join(name);
                manifest[file] = path.to_str().expect("text").into();
            }
            fs::write(path, manifest.to_string()).expect("written");
        }
        fs::rename(&first, &second).expect("moved");
        use_all(&second).await;
    });
}
