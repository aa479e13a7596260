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
            let disk = &manifest["base_disk"];
            assert_eq!(disk["path"], "rootfs/key/rootfs.ext4");
            assert!(disk["artifact"]["id"].is_string(), "{disk}");
        }
        fs::rename(&first, &second).expect("moved");
        use_all(&second).await;
    });
}

/// Returns a manifest in the form of release 0.1.0, with absolute paths.
fn as_release_0_1_0_wrote(manifest: &serde_json::Value, images: &Path) -> serde_json::Value {
    let text = |value: &serde_json::Value| value.as_str().expect("text").to_owned();
    let path = |file: &str| {
        let path = images.join(text(&manifest[file]["path"]));
        path.to_str().expect("text").to_owned()
    };
    let layers = manifest["disk_layers"].as_array().expect("layers");
    let layers = layers
        .iter()
        .map(|layer| text(&layer["id"]).replace("disk/", ""));
    let vmm = &manifest["requires"]["vmm"];
    let mut former = serde_json::json!({
        "version": 1,
        "vmm": format!("{} {}", text(&vmm["kind"]), text(&vmm["version"])),
        "accel": manifest["requires"]["accel"],
        "kernel": path("kernel"), "initrd": path("initrd"), "base_disk": path("base_disk"),
        "disk_layers": layers.collect::<Vec<_>>(),
    });
    for field in [
        "build",
        "created_unix_ms",
        "vcpus",
        "memory_mib",
        "disk_mib",
        "template",
        "default_user",
        "guest_token",
    ] {
        former[field] = manifest[field].clone();
    }
    former
}

#[test]
fn snapshots_of_release_0_1_0_are_usable_after_a_move() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let (first, second) = (data.path().join("first"), data.path().join("second"));
        make(&first).await;
        for (path, manifest) in manifests(&first) {
            let former = as_release_0_1_0_wrote(&manifest, &first.join("images"));
            fs::write(path, former.to_string()).expect("written");
        }
        fs::rename(&first, &second).expect("moved");
        use_all(&second).await;
    });
}
