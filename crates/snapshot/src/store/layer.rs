//! Disk layers of a store, and their checksums.
//!
//! A layer is linked into the store, unless a VMM may still hold a descriptor with which it can
//! write to the file. Such a layer is copied: a compromised VMM could otherwise change a snapshot
//! that other sandboxes are created from. The file system shares the blocks of the copy if it can
//! (`FICLONE`).
//!
//! `disks/<build>.sum` contains the checksum of a layer, as JSON. It exists for layers that were
//! copied and for those of named snapshots. A layer of a paused sandbox has none: computing it
//! would make each pause read the whole layer.
//!
//! | field      | content                                  |
//! |------------|------------------------------------------|
//! | `xxh3_64`  | XXH3-64 of the whole file, a number      |
//! | `len`      | size of the file, in bytes               |

use std::{
    fs,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, ioctl_ficlone};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::{Staging, Store, StoreError, failed};
use crate::{SnapshotId, is_zero};

/// Size of the parts in which layers are read, in bytes. A part of zeros becomes a hole.
const PART_BYTES: usize = 64 * 1024;

/// Mode of a layer: no VMM writes to it.
const READ_ONLY: u32 = 0o444;

/// Suffix of the file with a layer's checksum.
pub(super) const SUM_SUFFIX: &str = ".sum";

/// Layer that is not in the store yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewLayer {
    /// Id of the layer in the store.
    pub build: SnapshotId,
    /// Present path.
    pub path: PathBuf,
    /// True if a VMM may still write to the file. The store then gets a copy.
    pub is_open: bool,
}

/// Checksum of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct LayerSum {
    xxh3_64: u64,
    len: u64,
}

/// Returns the name of the file with the checksum of a layer.
pub(super) fn sum_name(build: SnapshotId) -> String {
    format!("{build}{SUM_SUFFIX}")
}

impl Staging {
    /// Adds a layer to the store. A layer that the store has already is kept.
    pub(super) fn take_layer(&self, layer: &NewLayer) -> Result<(), StoreError> {
        let target = self.store.layer(layer.build);
        if !layer.is_open {
            self.link_or_copy(&layer.path, &target)?;
            return self.take_sum(&layer.path, &target);
        }
        let copy = self.dir.join("layer");
        let sum = copy_layer(&layer.path, &copy)?;
        // The checksum is there first: a layer without one would not be verified.
        write_sum(&target, sum)?;
        wrenn_durable::rename(&copy, &target).map_err(failed("publish", &target))
    }

    /// Takes over the checksum of a layer of another store.
    fn take_sum(&self, source: &Path, target: &Path) -> Result<(), StoreError> {
        let source = source.with_extension(&SUM_SUFFIX[1..]);
        match source.exists() {
            true => self.link_or_copy(&source, &target.with_extension(&SUM_SUFFIX[1..])),
            false => Ok(()),
        }
    }
}

impl Store {
    /// Adds the missing checksums of a snapshot's layers. Must not be called while a VMM may write
    /// to one of them.
    ///
    /// # Errors
    /// Fails if the snapshot does not exist, or a file cannot be read or written.
    pub fn seal(&self, build: SnapshotId) -> Result<(), StoreError> {
        let _lock = self.lock(FlockOperation::LockShared)?;
        for layer in self.snapshot(build)?.manifest.layers() {
            let path = self.layer(layer);
            if path.exists() && read_sum(&path)?.is_none() {
                write_sum(&path, sum_of(&path)?)?;
            }
        }
        Ok(())
    }
}

/// Compares a layer of any store with its checksum. A layer without a checksum is not read.
///
/// # Errors
/// The error names the file if it is damaged or cannot be read.
pub fn verify_layer(path: &Path) -> Result<(), StoreError> {
    match read_sum(path)? {
        Some(written) if sum_of(path)? != written => Err(StoreError::Checksum(path.to_owned())),
        _ => Ok(()),
    }
}

/// Copies a layer and returns the checksum of the copy.
fn copy_layer(source: &Path, target: &Path) -> Result<LayerSum, StoreError> {
    let from = fs::File::open(source).map_err(failed("open", source))?;
    let to = fs::File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(target)
        .map_err(failed("create", target))?;
    let sum = match ioctl_ficlone(&to, &from) {
        Ok(()) => read_parts(&to, |_, _| Ok(())).map_err(failed("read", target))?,
        // Another file system, or one without shared blocks.
        Err(_) => copy_parts(&from, &to).map_err(failed("copy", target))?,
    };
    let protect = || {
        to.set_permissions(fs::Permissions::from_mode(READ_ONLY))?;
        to.sync_all()
    };
    protect().map_err(failed("flush", target))?;
    Ok(sum)
}

fn copy_parts(from: &fs::File, mut to: &fs::File) -> io::Result<LayerSum> {
    let sum = read_parts(from, |offset, part| {
        if is_zero(part) {
            return Ok(());
        }
        to.seek(SeekFrom::Start(offset))?;
        to.write_all(part)
    })?;
    to.set_len(sum.len)?;
    Ok(sum)
}

/// Passes the parts of a file with their offsets to `each`, and returns the checksum of the file.
fn read_parts(
    mut file: &fs::File,
    mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<LayerSum> {
    let (mut hasher, mut len) = (Xxh3::new(), 0);
    let mut part = vec![0; PART_BYTES];
    file.seek(SeekFrom::Start(0))?;
    loop {
        let read = file.read(&mut part)?;
        if read == 0 {
            break;
        }
        hasher.update(&part[..read]);
        each(len, &part[..read])?;
        len += read as u64;
    }
    Ok(LayerSum {
        xxh3_64: hasher.digest(),
        len,
    })
}

fn sum_of(path: &Path) -> Result<LayerSum, StoreError> {
    let sum = fs::File::open(path).and_then(|file| read_parts(&file, |_, _| Ok(())));
    sum.map_err(failed("read", path))
}

/// Returns the recorded checksum of a layer; `None` if it has none.
fn read_sum(layer: &Path) -> Result<Option<LayerSum>, StoreError> {
    let path = layer.with_extension(&SUM_SUFFIX[1..]);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(failed("read", &path))?,
    };
    let sum = serde_json::from_slice(&text).map_err(io::Error::from);
    sum.map(Some).map_err(failed("parse", &path))
}

fn write_sum(layer: &Path, sum: LayerSum) -> Result<(), StoreError> {
    let path = layer.with_extension(&SUM_SUFFIX[1..]);
    let text = serde_json::to_vec(&sum).map_err(io::Error::from);
    let written = text.and_then(|text| wrenn_durable::replace(&path, &text, READ_ONLY));
    written.map_err(failed("write", &path))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_copy_has_the_same_content_in_another_inode_and_keeps_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let [source, target] = ["source", "target"].map(|name| dir.path().join(name));
        let mut content = vec![0; 8 << 20];
        content[100] = 1;
        content[(8 << 20) - 1] = 2;
        fs::write(&source, &content).unwrap();
        let sum = copy_layer(&source, &target).unwrap();
        assert_eq!(sum, sum_of(&source).unwrap());
        assert_eq!(fs::read(&target).unwrap(), content);
        let [from, to] = [&source, &target].map(|path| fs::metadata(path).unwrap());
        assert_ne!(from.ino(), to.ino());
        assert_eq!(to.mode() & 0o777, READ_ONLY);
        assert!(to.blocks() * 512 < 1 << 20, "{} blocks", to.blocks());
    }

    #[test]
    fn the_file_of_a_checksum_has_a_fixed_format() {
        let sum = LayerSum {
            xxh3_64: u64::MAX,
            len: 7,
        };
        let text = r#"{"xxh3_64":18446744073709551615,"len":7}"#;
        assert_eq!(serde_json::to_string(&sum).unwrap(), text);
        assert_eq!(serde_json::from_str::<LayerSum>(text).unwrap(), sum);
    }
}
