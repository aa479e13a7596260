//! Measures how much of the data in a disk's layers is still part of the disk.
//!
//! Data that a guest deletes or trims, or that a higher layer replaces, stays in its layer until the
//! layer is merged.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::process::Command;

use super::{DiskError, PROGRAM, run};

/// Maximum duration. Only the metadata of the layers is read.
const DEADLINE: Duration = Duration::from_secs(120);

/// Returns the size of a layer with everything that `layers` add to their base image, in bytes.
/// Includes the metadata of such a layer.
pub(crate) async fn visible_bytes(layers: &[PathBuf], size_mib: u32) -> Result<u64, DiskError> {
    let mut command = Command::new(PROGRAM);
    command
        .args(["measure", "--output=json", "-O", "qcow2"])
        .arg(format!("json:{}", tree(layers, size_mib)));
    let output = run(command, DEADLINE).await?;
    let measured: Value = serde_json::from_slice(&output).unwrap_or_default();
    measured["required"]
        .as_u64()
        .ok_or_else(|| DiskError::Failed(PROGRAM, "its output has no field `required`".into()))
}

/// Returns the disk as a tree of block nodes, with zeros in place of the base image.
fn tree(layers: &[PathBuf], size_mib: u32) -> Value {
    let file = |path: &Path| json!({ "driver": "file", "filename": path });
    let above = |below: Value, layer: &PathBuf| json!({ "driver": "qcow2", "read-only": true, "file": file(layer), "backing": below });
    let bytes = u64::from(size_mib) * 1024 * 1024;
    let zeros = json!({ "driver": "null-co", "read-zeroes": true, "size": bytes });
    layers.iter().fold(zeros, above)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::disk::create_at;

    const MIB: u64 = 1 << 20;

    #[tokio::test]
    async fn data_that_a_higher_layer_trims_or_replaces_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let mut layers = Vec::new();
        for (name, writes, expected_mib) in [
            ("first", vec!["write -P 1 0 8M"], 8),
            ("second", vec!["write -P 2 0 2M", "write -P 2 8M 1M"], 9),
            // As a guest trims.
            ("third", vec!["discard 0 7M"], 2),
        ] {
            let path = dir.path().join(name);
            create_at(&path, 64, 0).await.unwrap();
            layers.push(path);
            let mut writable = tree(&layers, 64);
            writable["read-only"] = false.into();
            writable["discard"] = "unmap".into();
            let mut command = Command::new("qemu-io");
            for text in writes {
                command.args(["-c", text]);
            }
            let done = command.arg(format!("json:{writable}")).output().await;
            let done = done.unwrap();
            assert!(done.status.success(), "{done:?}");
            let bytes = visible_bytes(&layers, 64).await.unwrap();
            let expected = expected_mib * MIB..(expected_mib + 1) * MIB;
            assert!(expected.contains(&bytes), "{name}: {bytes}");
        }
    }

    #[tokio::test]
    async fn a_layer_that_is_none_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        std::fs::write(&path, "no layer").unwrap();
        assert!(visible_bytes(&[path], 8).await.is_err());
    }
}
