//! Block nodes of an export: one per file of the disk, named so that QMP commands can refer to
//! them.
//!
//! ```text
//! export ─► overlay-1 ─► overlay-0 ─► below (highest layer) ─► … ─► base
//!             │            │
//!           file-1       file-0
//! ```

use serde_json::{Value, json};
use wrenn_jail::{BASE_DISK, DISK};

use crate::tool;

/// Directory of the overlays that are added later, in the jail.
pub(super) const OVERLAYS: &str = "/tmp/fc-vm/overlays";

/// Name of the node below the first overlay.
const BELOW: &str = "below";

/// Name of the FUSE export.
const EXPORT: &str = "disk";

/// QMP command and its arguments.
pub(super) type Call = (&'static str, Value);

/// Overlay of an export, by number. 0 is the one that the export started with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Overlay(u32);

impl Overlay {
    fn node(self) -> String {
        format!("overlay-{}", self.0)
    }

    fn file_node(self) -> String {
        format!("file-{}", self.0)
    }

    /// Name of the file in [`OVERLAYS`].
    pub(super) fn file_name(self) -> String {
        self.0.to_string()
    }

    fn path(self) -> String {
        match self.0 {
            0 => DISK.to_owned(),
            number => format!("{OVERLAYS}/{number}"),
        }
    }

    /// Returns the command that opens the overlay, which is put on top later.
    pub(super) fn open(self) -> Call {
        ("blockdev-add", self.node_on(&Value::Null))
    }

    /// Returns the command that closes an overlay which is not on top.
    pub(super) fn close(self) -> Call {
        ("blockdev-del", json!({ "node-name": self.node() }))
    }

    /// Describes the overlay over a node, or over the description of one. The file is locked, so
    /// that no two exporters write to it.
    fn node_on(self, below: &Value) -> Value {
        json!({
            "driver": "qcow2",
            "node-name": self.node(),
            "discard": "unmap",
            "file": {
                "driver": "file",
                "node-name": self.file_node(),
                "filename": self.path(),
                "discard": "unmap",
            },
            "backing": below,
        })
    }
}

/// Overlays of a running export.
#[derive(Debug)]
pub(super) struct Nodes {
    top: Overlay,
    /// Name of the node below the topmost overlay.
    below: String,
    /// Number of the overlay that was opened last. One that could not be put on top may stay open,
    /// so its number is not used again.
    opened: u32,
}

impl Nodes {
    /// Returns the overlays of an export that was started with [`start_args`].
    pub(super) fn new() -> Self {
        Self {
            top: Overlay(0),
            below: BELOW.to_owned(),
            opened: 0,
        }
    }

    /// Returns the next overlay, which is not on top yet.
    pub(super) fn open_next(&mut self) -> Overlay {
        self.opened += 1;
        Overlay(self.opened)
    }

    /// Returns the command that makes the topmost overlay a read-only layer below `next`.
    pub(super) fn put_on_top(&self, next: Overlay) -> Call {
        let arguments = json!({ "node": self.top.node(), "overlay": next.node() });
        ("blockdev-snapshot", arguments)
    }

    /// Records that an overlay was put on top.
    pub(super) fn switched(&mut self, next: Overlay) {
        self.below = self.top.node();
        self.top = next;
    }

    /// Returns the command that flushes the topmost overlay.
    ///
    /// The daemon has no command for this purpose. It flushes a node before it reopens it, here with
    /// the options that the node has.
    pub(super) fn flush(&self) -> Call {
        let mut options = self.top.node_on(&json!(self.below));
        options["file"] = json!(self.top.file_node());
        ("blockdev-reopen", json!({ "options": [options] }))
    }
}

/// Returns the daemon's arguments for an export with a number of read-only layers. The tree of
/// nodes overrides the backing files named in the qcow2 headers.
pub(super) fn start_args(layers: usize, mountpoint: &str) -> Vec<String> {
    // As in a VM, files that never change are not locked.
    let file = |path: &str| json!({ "driver": "file", "filename": path, "locking": "off" });
    let base = json!({ "driver": "raw", "read-only": true, "file": file(BASE_DISK) });
    let above = |below: Value, number: usize| {
        let file = file(&tool::layer_path(number));
        json!({ "driver": "qcow2", "read-only": true, "file": file, "backing": below })
    };
    let mut below = (0..layers).fold(base, above);
    below["node-name"] = json!(BELOW);
    let export = json!({
        "type": "fuse",
        "id": EXPORT,
        "node-name": Overlay(0).node(),
        "mountpoint": mountpoint,
        "writable": true,
        "allow-other": "off",
    });
    let tree = Overlay(0).node_on(&below).to_string();
    let export = export.to_string();
    let args = ["--blockdev", &tree, "--export", &export];
    tool::MONITOR_ARGS
        .into_iter()
        .chain(args)
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_names_the_topmost_overlay_and_what_is_below() {
        let mut nodes = Nodes::new();
        let options = |nodes: &Nodes| nodes.flush().1["options"][0].clone();
        assert_eq!(options(&nodes)["node-name"], "overlay-0");
        assert_eq!(options(&nodes)["backing"], "below");
        // An overlay that could not be put on top.
        assert_eq!(nodes.open_next(), Overlay(1));
        let next = nodes.open_next();
        assert_eq!(nodes.put_on_top(next).1["overlay"], "overlay-2");
        nodes.switched(next);
        let now = options(&nodes);
        assert_eq!(now["node-name"], "overlay-2");
        assert_eq!(now["file"], "file-2");
        assert_eq!(now["backing"], "overlay-0");
    }

    #[test]
    fn only_the_overlay_is_locked_and_writable() {
        let args = start_args(2, "/dev/fd/9");
        let tree: Value = serde_json::from_str(&args[5]).expect("JSON");
        assert_eq!(tree["file"]["locking"], Value::Null);
        assert_eq!(tree["read-only"], Value::Null);
        let mut node = &tree["backing"];
        assert_eq!(node["node-name"], BELOW);
        let mut files = Vec::new();
        while !node.is_null() {
            assert_eq!(node["read-only"], true);
            assert_eq!(node["file"]["locking"], "off");
            files.push(node["file"]["filename"].as_str().unwrap_or_default());
            node = &node["backing"];
        }
        let expected = ["/tmp/fc-vm/layers/1", "/tmp/fc-vm/layers/0", BASE_DISK];
        assert_eq!(files, expected);
    }
}
