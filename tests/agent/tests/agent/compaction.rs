//! Merging of disk layers in a jail. Layers were written by VMMs, so they may be hostile.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::json;
use wrenn_disk::{DiskError, Layers, ToolJails};

use crate::agent::on_private_host;

const MIB: usize = 1 << 20;

/// Program that enters the jail.
const EXE: &str = env!("CARGO_BIN_EXE_wrenn-fake-supervisor");

fn tools() -> ToolJails {
    ToolJails::new(Path::new(EXE), |_| Ok(Vec::new()))
}

/// Runs `qemu-io` commands on a disk made of the base and `layers`.
fn io(dir: &Path, layers: &[PathBuf], commands: &[&str]) -> String {
    let file = |path: &Path| json!({ "driver": "file", "filename": path });
    let mut tree = json!({ "driver": "raw", "read-only": true, "file": file(&dir.join("base")) });
    for layer in layers {
        tree = json!({
            "driver": "qcow2", "discard": "unmap", "file": file(layer), "backing": tree
        });
    }
    let mut command = Command::new("qemu-io");
    for text in commands {
        command.args(["-c", text]);
    }
    let done = command.arg(format!("json:{tree}")).output().expect("run");
    assert!(done.status.success(), "{done:?}");
    String::from_utf8(done.stdout).expect("text")
}

/// Makes a layer readable for the jail, as the store does.
fn protect(path: &Path) {
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o444);
    fs::set_permissions(path, mode).expect("set");
}

/// Creates three layers: data of their own, data that hides a lower layer's, and zeros over the
/// base.
async fn layers(dir: &Path) -> Vec<PathBuf> {
    fs::write(dir.join("base"), vec![1; 8 * MIB]).expect("written");
    let mut layers = Vec::new();
    for (name, writes) in [
        ("first", vec!["write -P 2 0 1M", "write -P 2 1M 1M"]),
        ("second", vec!["write -P 3 1M 1M", "write -z 2M 1M"]),
        ("third", vec!["write -P 4 3M 64k"]),
    ] {
        let path = dir.join(name);
        wrenn_disk::create(&path, 8, 0).await.expect("created");
        layers.push(path);
        io(dir, &layers, &writes);
    }
    layers.iter().for_each(|path| protect(path));
    layers
}

async fn merge(
    dir: &Path,
    kept: &[PathBuf],
    merged: &[PathBuf],
    path: &Path,
) -> Result<(), DiskError> {
    let layers = Layers {
        base: &dir.join("base"),
        kept,
        merged,
        size_mib: 8,
    };
    wrenn_disk::merge(&tools(), layers, path).await
}

const CONTENT: [&str; 6] = [
    "read -P 2 0 1M",
    "read -P 3 1M 1M",
    "read -P 0 2M 1M",
    "read -P 4 3M 64k",
    "read -P 1 3136k 960k",
    "read -P 1 4M 4M",
];

#[test]
fn merged_disk_has_the_same_content_and_keeps_its_layers() {
    on_private_host(async || {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path();
        let layers = layers(dir).await;
        let read = || -> Vec<_> { layers.iter().map(|l| fs::read(l).expect("read")).collect() };
        let before = read();
        for keep in [0, 1] {
            let new = dir.join(format!("keeps-{keep}"));
            let (kept, merged) = layers.split_at(keep);
            merge(dir, kept, merged, &new).await.expect("merged");
            // A merged layer can be merged again.
            wrenn_disk::Header::read(&new).expect("accepted");
            let mut now = kept.to_vec();
            now.push(new);
            let seen = io(dir, &now, &CONTENT);
            assert!(!seen.contains("verification failed"), "{keep}: {seen}");
        }
        assert!(before == read());
    });
}

#[test]
fn data_that_a_higher_layer_trims_or_replaces_is_not_measured() {
    on_private_host(async || {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path();
        fs::write(dir.join("base"), vec![1; 64 * MIB]).expect("written");
        let mut layers = Vec::new();
        for (name, writes, expected_mib) in [
            ("first", vec!["write -P 1 0 8M"], 8),
            ("second", vec!["write -P 2 0 2M", "write -P 2 8M 1M"], 9),
            // As a guest trims.
            ("third", vec!["discard 0 7M"], 2),
        ] {
            let path = dir.join(name);
            wrenn_disk::create(&path, 64, 0).await.expect("created");
            layers.push(path.clone());
            io(dir, &layers, &writes);
            protect(&path);
            let bytes = wrenn_disk::visible_bytes(&tools(), &layers, 64).await;
            let bytes = bytes.expect("measured");
            let expected = expected_mib * MIB as u64..(expected_mib + 1) * MIB as u64;
            assert!(expected.contains(&bytes), "{name}: {bytes}");
        }
        fs::write(dir.join("no-layer"), "no layer").expect("written");
        let error = wrenn_disk::visible_bytes(&tools(), &[dir.join("no-layer")], 64).await;
        assert!(matches!(error, Err(DiskError::Layer { .. })), "{error:?}");
    });
}

#[test]
fn a_layer_that_names_a_file_of_the_host_is_rejected_and_the_file_is_not_read() {
    on_private_host(async || {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path();
        let layers = layers(dir).await;
        let secret = dir.join("secret");
        fs::write(&secret, vec![b's'; 8 * MIB]).expect("written");
        let backing = format!("backing_file={},backing_fmt=raw", secret.display());
        let data = format!("data_file={},data_file_raw=on", secret.display());
        for options in [backing, data] {
            let hostile = dir.join("hostile");
            let _ = fs::remove_file(&hostile);
            let status = Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2", "-u", "-o", &options])
                .arg(&hostile)
                .arg("8M")
                .status();
            assert!(status.expect("run").success());
            // Creating a data file truncates it.
            fs::write(&secret, vec![b's'; 8 * MIB]).expect("written");
            protect(&hostile);
            let chain = [layers[0].clone(), hostile.clone()];
            let new = dir.join("new");
            let error = merge(dir, &[], &chain, &new).await.expect_err("rejected");
            assert!(matches!(error, DiskError::Layer { .. }), "{error:?}");
            assert!(error.to_string().contains("hostile"), "{error}");
            assert!(!new.exists(), "{options}");
        }
    });
}

#[test]
fn invalid_layer_is_named_and_leaves_no_file() {
    on_private_host(async || {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path();
        let layers = layers(dir).await;
        fs::write(&layers[1], "no layer").expect("written");
        let new = dir.join("new");
        let error = merge(dir, &[], &layers, &new).await.expect_err("rejected");
        assert!(error.to_string().contains("second"), "{error}");
        assert!(!new.exists());
        // An accepted header with a table of an impossible size.
        let mut bytes = fs::read(&layers[2]).expect("read");
        bytes[36..40].copy_from_slice(&u32::MAX.to_be_bytes());
        fs::write(&layers[2], bytes).expect("written");
        let bad = [layers[0].clone(), layers[2].clone()];
        let error = merge(dir, &[], &bad, &new).await.expect_err("damaged");
        assert!(matches!(error, DiskError::Failed(..)), "{error:?}");
        assert!(!new.exists());
    });
}

#[test]
fn a_copy_to_a_full_disk_fails_at_once_with_the_reason() {
    on_private_host(async || {
        let dir = tempfile::tempdir().expect("a directory");
        let layers = layers(dir.path()).await;
        let small = dir.path().join("small");
        fs::create_dir(&small).expect("created");
        let (tmpfs, flags) = (Some("tmpfs"), nix::mount::MsFlags::empty());
        nix::mount::mount(tmpfs, &small, tmpfs, flags, Some("size=1m")).expect("mounted");
        let new = small.join("new");
        let merged = merge(dir.path(), &[], &layers, &new);
        let merged = tokio::time::timeout(Duration::from_secs(30), merged).await;
        let error = merged.expect("in time").expect_err("full");
        assert!(error.is_out_of_space(), "{error:?}");
        assert!(!new.exists());
    });
}
