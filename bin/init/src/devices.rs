//! Device nodes of drivers that are not loaded yet. A program that opens such a node makes the
//! kernel load the driver.
//!
//! `depmod` lists these nodes in `modules.devname`, for udev and `kmod static-nodes`. The nodes of
//! loaded drivers are created by the kernel.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{CWD, FileType, Mode, makedev, mknodat},
    io::Errno,
    system::uname,
};

const DEV: &str = "/dev";

/// Nodes that any user may open, as with udev's rules. The drivers check what a user may do.
const OPEN_TO_ALL: [&str; 2] = ["fuse", "net/tun"];

/// Loop devices that exist from the start. The driver creates more on demand.
const LOOP_DEVICES: u32 = 8;
const LOOP_MAJOR: u32 = 7;

/// Group of disks (`disk`), the same in every Debian system.
const DISK_GROUP: u32 = 6;

/// Device node.
#[derive(Debug, PartialEq, Eq)]
struct Node {
    /// Path below `/dev`.
    path: String,
    kind: FileType,
    major: u32,
    minor: u32,
}

/// Creates the nodes. Tries all of them and returns the first error. A guest without modules has
/// none.
pub(crate) fn create() -> io::Result<()> {
    let release = uname();
    let release = release.release().to_string_lossy();
    let list = fs::read_to_string(format!("/lib/modules/{release}/modules.devname"));
    let Ok(list) = list else { return Ok(()) };
    let mut outcome = Ok(());
    for node in list.lines().filter_map(parse).chain(loop_devices()) {
        outcome = outcome.and(make(&node));
    }
    outcome
}

/// Parses a line of `modules.devname`: module, path, and number, such as `fuse fuse c10:229`.
/// Returns `None` for a comment, or a path that leaves `/dev`.
fn parse(line: &str) -> Option<Node> {
    let mut words = line.split_whitespace();
    let (module, path, number) = (words.next()?, words.next()?, words.next()?);
    if module.starts_with('#') {
        return None;
    }
    let is_plain = |part| matches!(part, Component::Normal(_));
    if !Path::new(path).components().all(is_plain) {
        return None;
    }
    let kind = match number.get(..1)? {
        "c" => FileType::CharacterDevice,
        "b" => FileType::BlockDevice,
        _ => return None,
    };
    let (major, minor) = number.get(1..)?.split_once(':')?;
    Some(Node {
        path: path.to_owned(),
        kind,
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    })
}

fn loop_devices() -> impl Iterator<Item = Node> {
    (0..LOOP_DEVICES).map(|minor| Node {
        path: format!("loop{minor}"),
        kind: FileType::BlockDevice,
        major: LOOP_MAJOR,
        minor,
    })
}

fn make(node: &Node) -> io::Result<()> {
    let path = PathBuf::from(DEV).join(&node.path);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let number = makedev(node.major, node.minor);
    match mknodat(CWD, &path, node.kind, Mode::RUSR | Mode::WUSR, number) {
        // The driver is part of the kernel.
        Err(Errno::EXIST) | Ok(()) => {}
        Err(error) => return Err(error.into()),
    }
    let mode = match node.kind {
        _ if OPEN_TO_ALL.contains(&&*node.path) => 0o666,
        FileType::BlockDevice => 0o660,
        _ => 0o600,
    };
    if node.kind == FileType::BlockDevice {
        chown(&path, None, Some(DISK_GROUP))?;
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_a_node_and_its_number() {
        let node = parse("tun net/tun c10:200").expect("a node");
        let expected = Node {
            path: "net/tun".to_owned(),
            kind: FileType::CharacterDevice,
            major: 10,
            minor: 200,
        };
        assert_eq!(node, expected);
        assert_eq!(
            parse("x y b7:0").map(|node| node.kind),
            Some(FileType::BlockDevice)
        );
    }

    #[test]
    fn other_lines_are_skipped() {
        for line in [
            "# Device nodes to trigger on-demand module loading.",
            "",
            "fuse fuse",
            "fuse fuse 10:229",
            "fuse fuse c10",
            "fuse fuse c10:x",
            "fuse ../fuse c10:229",
            "fuse /etc/fuse c10:229",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
