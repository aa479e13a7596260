//! Disk layers of snapshots that other sandboxes are created from: no VMM can change them, and a
//! damaged one is found.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use connectrpc::ErrorCode;
use wrenn_proto::rpc::hostagent::v1 as pb;

use crate::agent::{TestAgent, on_private_host, request};

/// Returns the layers in the store.
fn layers(data_dir: &Path) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(data_dir.join("snapshots/disks")).expect("a store");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths
        .filter(|path| path.extension().is_some_and(|kind| kind == "qcow2"))
        .collect()
}

fn inodes(paths: impl IntoIterator<Item = PathBuf>) -> BTreeSet<u64> {
    let inode = |path: PathBuf| fs::metadata(path).expect("a file").ino();
    paths.into_iter().map(inode).collect()
}

fn disks(agent: &TestAgent, id: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(agent.sandbox_dir(id)).expect("a directory");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths
        .filter(|path| path.extension().is_some_and(|kind| kind == "qcow2"))
        .collect()
}

async fn create_from(
    agent: &TestAgent,
    id: &str,
    template: &str,
) -> Result<(), connectrpc::ConnectError> {
    let request = pb::CreateSandboxRequest {
        template: template.to_owned(),
        ..request(id)
    };
    agent.create_with(request).await.map(drop)
}

#[test]
fn a_running_vmm_holds_no_file_that_a_published_snapshot_depends_on() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-1").await.expect("made");
        agent.snapshot("sb-1", "first").await.expect("taken");
        let first = layers(data.path());
        assert_eq!(first.len(), 1);
        let own = inodes(disks(&agent, "sb-1"));
        assert!(inodes(first.clone()).is_disjoint(&own));
        // The VMM still has its file, and changes it.
        let original = agent.sandbox_dir("sb-1").join("rootfs.qcow2");
        fs::write(original, "hostile").expect("written");
        create_from(&agent, "sb-2", "first")
            .await
            .expect("not damaged");

        // The copy of the first snapshot is used again, and only the new file is copied.
        agent.snapshot("sb-1", "second").await.expect("taken");
        let second = layers(data.path());
        assert!(first.is_subset(&second));
        assert_eq!(second.len(), 2, "{second:?}");
        let own = inodes(disks(&agent, "sb-1"));
        assert!(inodes(second).is_disjoint(&own));
        create_from(&agent, "sb-3", "second")
            .await
            .expect("not damaged");
        assert_eq!(agent.spec("sb-3").disk_layers.len(), 2);

        // A pause ends the VMM, so its file needs no copy.
        agent.pause("sb-1").await.expect("paused");
        assert_eq!(layers(data.path()).len(), 3);
        agent.resume("sb-1").await.expect("resumed");
        for id in ["sb-1", "sb-2", "sb-3"] {
            agent.destroy(id).await.expect("destroyed");
        }
        agent.stop().await;
    });
}

#[test]
fn a_damaged_layer_of_a_named_snapshot_is_found_before_a_vm_uses_it() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        // Named while it runs, and while it is paused.
        for (id, name, paused) in [("sb-1", "running", false), ("sb-2", "paused", true)] {
            agent.create(id).await.expect("made");
            let before = layers(data.path());
            if paused {
                agent.pause(id).await.expect("paused");
            }
            agent.snapshot(id, name).await.expect("taken");
            let after = layers(data.path());
            let layer = after.difference(&before).next().expect("a layer");
            let mut content = fs::read(layer).expect("read");
            *content.last_mut().expect("not empty") ^= 1;
            fs::write(layer, content).expect("written");
            let error = create_from(&agent, "sb-3", name).await;
            let error = error.expect_err("damaged");
            assert_eq!(error.code, ErrorCode::Internal, "{error}");
            let file = layer.file_name().expect("a name").to_string_lossy();
            assert!(error.to_string().contains(&*file), "{error}");
            agent.destroy(id).await.expect("destroyed");
        }
        agent.stop().await;
    });
}
