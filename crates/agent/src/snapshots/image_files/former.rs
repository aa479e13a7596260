//! Files of manifests of version 1, which are named by their paths.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use wrenn_snapshot::ImageFile;
use wrenn_store::Kind;

use super::{Holder, ImageFiles, REPLACED};

/// Superblock of an ext4 file system: place in the image, magic number, and the places of fields in
/// it (`fs/ext4/ext4.h` of Linux).
const SUPERBLOCK: u64 = 1024;
const MAGIC: (u64, [u8; 2]) = (SUPERBLOCK + 0x38, [0x53, 0xef]);
const UUID: u64 = SUPERBLOCK + 0x68;
const MADE_SEC: u64 = SUPERBLOCK + 0x108;

impl ImageFiles {
    /// Returns the path of a file of a snapshot that was made at a time.
    pub(super) fn located_by_path(
        &self,
        file: &ImageFile,
        kind: Kind,
        holder: Holder,
        made_unix_ms: i64,
    ) -> PathBuf {
        let path = &file.path;
        if path.is_relative() {
            let found = self.root.join(path);
            // An image that was built again is another one: the snapshot's counts as missing.
            let is_other =
                file.uuid.is_some() && uuid_of(&found).is_ok_and(|uuid| uuid != file.uuid);
            return match is_other {
                true => found.with_extension(REPLACED),
                false => found,
            };
        }
        if holder == Holder::DataDir && path.exists() {
            return path.clone();
        }
        match self.moved(path) {
            // Another image may have been built under the same name.
            Some(moved)
                if kind != Kind::Rootfs
                    || is_made_before(&moved, made_unix_ms).unwrap_or(false) =>
            {
                moved
            }
            _ => path.clone(),
        }
    }
}

/// Opens an image. Returns `None` if it contains no ext4 file system.
fn open_ext4(image: &Path) -> io::Result<Option<File>> {
    let image = File::open(image)?;
    let mut magic = [0; 2];
    image.read_exact_at(&mut magic, MAGIC.0)?;
    Ok((magic == MAGIC.1).then_some(image))
}

/// Returns the UUID of an ext4 file system in hexadecimal digits. Copies of its image have the
/// same.
fn uuid_of(image: &Path) -> io::Result<Option<String>> {
    let Some(image) = open_ext4(image)? else {
        return Ok(None);
    };
    let mut uuid = [0; 16];
    image.read_exact_at(&mut uuid, UUID)?;
    Ok(Some(format!("{:032x}", u128::from_be_bytes(uuid))))
}

/// True if an ext4 file system was created before a time. Copies of its image do not change that.
fn is_made_before(image: &Path, unix_ms: i64) -> io::Result<bool> {
    let Some(image) = open_ext4(image)? else {
        return Ok(false);
    };
    let mut made_sec = [0; 4];
    image.read_exact_at(&mut made_sec, MADE_SEC)?;
    Ok(i64::from(u32::from_le_bytes(made_sec)) * 1000 <= unix_ms)
}
