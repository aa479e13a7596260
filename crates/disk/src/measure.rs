//! Measures how much of the data in a disk's layers is still part of the disk, in a jail.
//!
//! Data that a guest deletes or trims, or that a higher layer replaces, stays in its layer until
//! the layer is merged.

use std::{path::PathBuf, process::Stdio, time::Duration};

use serde_json::{Value, json};

use crate::{
    DiskError,
    tool::{self, Tool, ToolJails, Work},
};

/// Program that measures.
const PROGRAM: Tool = Tool {
    name: "qemu-img",
    package: "qemu-utils",
};

/// Maximum duration. Only the metadata of the layers is read.
const DEADLINE: Duration = Duration::from_secs(120);

/// Returns the size of a layer with everything that `layers` add to their base image, in bytes.
/// Includes the metadata of such a layer.
///
/// # Errors
/// See [`DiskError`].
pub async fn visible_bytes(
    jails: &ToolJails,
    layers: &[PathBuf],
    size_mib: u32,
) -> Result<u64, DiskError> {
    let paths = || layers.iter().map(PathBuf::as_path);
    tool::check(paths(), size_mib)?;
    let jail = jails.claim().await;
    let args = ["measure", "--output=json", "-O", "qcow2"];
    let mut args = args.map(str::to_owned).to_vec();
    args.push(format!("json:{}", tree(layers.len())));
    let work = Work {
        args,
        files: Vec::new(),
        layers: paths().collect(),
        fds: Vec::new(),
        size_mib,
        stdin: Stdio::null(),
        stdout: Stdio::piped(),
    };
    let running = PROGRAM.start(&jail, work)?;
    let output = tokio::time::timeout(DEADLINE, running.output()).await;
    let (output, ended) = output.map_err(|_| DiskError::Deadline {
        program: PROGRAM.name,
        deadline: DEADLINE,
    })??;
    ended.map_err(|printed| DiskError::Failed(PROGRAM.name, printed))?;
    let measured: Value = serde_json::from_slice(&output).unwrap_or_default();
    measured["required"]
        .as_u64()
        .ok_or_else(|| DiskError::Failed(PROGRAM.name, "its output has no field `required`".into()))
}

/// Returns the disk as a tree of block nodes, with nothing in place of the base image: what is
/// beyond the end of a base image reads as zeros.
fn tree(layers: usize) -> Value {
    let above = |below: Value, number: usize| {
        let path = tool::layer_path(number);
        // As in a VM, files that never change are not locked.
        let file = json!({ "driver": "file", "filename": path, "locking": "off" });
        json!({ "driver": "qcow2", "read-only": true, "file": file, "backing": below })
    };
    // A driver that takes no file name (`null-co`) is rejected below a layer whose header has one.
    let file = json!({ "driver": "host_device", "filename": "/dev/null" });
    let nothing = json!({ "driver": "raw", "read-only": true, "file": file });
    (0..layers).fold(nothing, above)
}
