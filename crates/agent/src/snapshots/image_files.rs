//! Files of the image directory that snapshots depend on: kernel, initial RAM disk, and the image
//! at the base of the disk.
//!
//! A manifest names them relative to the image directory, so that the directory can be moved or
//! copied together with its snapshots. A file elsewhere has its absolute path, as all files in
//! manifests of earlier versions do. Such a file is found after a move, too: its name and the names
//! of the two directories above it are those of the image store.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Component, Path, PathBuf},
};

use wrenn_snapshot::Manifest;

/// Directories of the image store that contain these files.
const KINDS: [&str; 2] = ["kernels", "rootfs"];

/// Extension of the path of an image that was replaced by another one. No file has it.
const REPLACED: &str = "replaced-since-the-snapshot";

/// Store that a manifest is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holder {
    /// The store in the data directory, whose snapshots may depend on another image directory.
    DataDir,
    /// The store in the image directory, whose snapshots depend on that directory.
    ImageDir,
}

/// Names and paths of the files in one image directory.
#[derive(Debug)]
pub(super) struct ImageFiles(PathBuf);

impl ImageFiles {
    pub(super) fn of(images_dir: &Path) -> Self {
        Self(images_dir.to_owned())
    }

    /// Replaces the paths of a new manifest by names, and records which image is the base.
    pub(super) fn name(&self, manifest: &mut Manifest) {
        // Without the UUID, an image that is built again is not told apart.
        manifest.base_disk_uuid = uuid_of(&manifest.base_disk).ok().flatten();
        for path in paths(manifest) {
            if let Some(name) = self.name_of(path) {
                *path = name;
            }
        }
    }

    /// Replaces the names of a stored manifest by paths.
    pub(super) fn locate(&self, manifest: &mut Manifest, holder: Holder) {
        let created_unix_ms = manifest.created_unix_ms;
        let base_disk = manifest.base_disk.clone();
        let expected_uuid = manifest.base_disk_uuid.clone();
        for path in paths(manifest) {
            if path.is_relative() {
                let found = self.0.join(&*path);
                // An image that was built again is another one: the snapshot's counts as missing.
                let is_other = *path == base_disk
                    && expected_uuid.is_some()
                    && uuid_of(&found).is_ok_and(|uuid| uuid != expected_uuid);
                *path = match is_other {
                    true => found.with_extension(REPLACED),
                    false => found,
                };
                continue;
            }
            if holder == Holder::DataDir && path.exists() {
                continue;
            }
            let Some(moved) = self.moved(path) else {
                continue;
            };
            // Another image may have been built under the same name.
            if *path != base_disk || is_made_before(&moved, created_unix_ms).unwrap_or(false) {
                *path = moved;
            }
        }
    }

    fn name_of(&self, path: &Path) -> Option<PathBuf> {
        if let Ok(name) = path.strip_prefix(&self.0) {
            return Some(name.to_owned());
        }
        // Two spellings of the same directory.
        let dir = self.0.canonicalize().ok()?;
        let path = path.canonicalize().ok()?;
        path.strip_prefix(dir).ok().map(Path::to_owned)
    }

    /// Returns the path in this directory of a file that was in another image directory.
    fn moved(&self, path: &Path) -> Option<PathBuf> {
        let mut names = path.components().rev();
        let (file, key, kind) = (names.next()?, names.next()?, names.next()?);
        let Component::Normal(kind) = kind else {
            return None;
        };
        let moved = self.0.join(kind).join(key).join(file);
        (KINDS.iter().any(|known| kind == *known) && moved.exists()).then_some(moved)
    }
}

fn paths(manifest: &mut Manifest) -> [&mut PathBuf; 3] {
    [
        &mut manifest.kernel,
        &mut manifest.initrd,
        &mut manifest.base_disk,
    ]
}

/// Superblock of an ext4 file system: place in the image, magic number, and the places of fields in
/// it (`fs/ext4/ext4.h` of Linux).
const SUPERBLOCK: u64 = 1024;
const MAGIC: (u64, [u8; 2]) = (SUPERBLOCK + 0x38, [0x53, 0xef]);
const UUID: u64 = SUPERBLOCK + 0x68;
const MADE_SEC: u64 = SUPERBLOCK + 0x108;

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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
pub(super) mod tests {
    use std::fs;

    use super::*;

    /// Creates the files of an image store, with a file system that was created at a time.
    pub(in crate::snapshots) fn image_store(dir: &Path, made_sec: u32) {
        for kind in KINDS {
            fs::create_dir_all(dir.join(kind).join("key")).unwrap();
        }
        let mut image = vec![0; 4096];
        image[1024 + 0x38..][..2].copy_from_slice(&[0x53, 0xef]);
        image[1024 + 0x108..][..4].copy_from_slice(&made_sec.to_le_bytes());
        fs::write(dir.join("kernels/key/vmlinux"), "").unwrap();
        fs::write(dir.join("kernels/key/initrd.img"), "").unwrap();
        fs::write(dir.join("rootfs/key/rootfs.ext4"), image).unwrap();
    }

    /// Returns a manifest whose files are in an image directory, which may be empty.
    pub(in crate::snapshots) fn manifest(images_dir: &str) -> Manifest {
        let text = serde_json::json!({
            "version": 1, "build": "0".repeat(32), "created_unix_ms": 2000, "vmm": "qemu 7.2.22",
            "accel": "tcg", "cpu": "max", "vcpus": 1, "memory_mib": 256, "disk_mib": 5120,
            "kernel": format!("{images_dir}kernels/key/vmlinux"),
            "initrd": format!("{images_dir}kernels/key/initrd.img"),
            "base_disk": format!("{images_dir}rootfs/key/rootfs.ext4"),
            "disk_layers": [], "template": "minimal", "default_user": "root", "guest_token": "t",
        });
        Manifest::parse(text.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn manifest_names_files_of_the_image_directory_only() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        image_store(&images, 1);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&images, &link).unwrap();
        for spelling in [&images, &link] {
            let mut made = manifest(&format!("{}/", spelling.display()));
            ImageFiles::of(&images).name(&mut made);
            assert_eq!(made.base_disk_uuid.take(), Some("0".repeat(32)));
            assert_eq!(made, manifest(""));
        }
        let mut elsewhere = manifest("/elsewhere/");
        ImageFiles::of(&images).name(&mut elsewhere);
        assert_eq!(elsewhere, manifest("/elsewhere/"));
    }

    #[test]
    fn files_are_found_after_a_move_by_name_and_by_their_former_path() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        image_store(&images, 1);
        let here = format!("{}/", images.display());
        let located = |stored: &str, holder| {
            let mut stored = manifest(stored);
            ImageFiles::of(&images).locate(&mut stored, holder);
            stored
        };
        for holder in [Holder::DataDir, Holder::ImageDir] {
            assert_eq!(located("", holder), manifest(&here));
            assert_eq!(located("/gone/images/", holder), manifest(&here));
        }
        // After a copy, the former directory exists as well.
        let other = dir.path().join("other");
        image_store(&other, 1);
        let there = format!("{}/", other.display());
        assert_eq!(located(&there, Holder::DataDir), manifest(&there));
        assert_eq!(located(&there, Holder::ImageDir), manifest(&here));
    }

    #[test]
    fn image_that_was_built_after_the_snapshot_is_not_taken_for_its_image() {
        let dir = tempfile::tempdir().unwrap();
        image_store(dir.path(), 3);
        let mut stored = manifest("/gone/");
        ImageFiles::of(dir.path()).locate(&mut stored, Holder::DataDir);
        assert_eq!(stored.base_disk, manifest("/gone/").base_disk);
        // A relative name is that of this directory. The clock may have been wrong.
        let image = dir.path().join("rootfs/key/rootfs.ext4");
        let located = |uuid: Option<char>| {
            let mut stored = manifest("");
            stored.base_disk_uuid = uuid.map(|digit| digit.to_string().repeat(32));
            ImageFiles::of(dir.path()).locate(&mut stored, Holder::DataDir);
            stored.base_disk
        };
        assert_eq!(
            (located(None), located(Some('0'))),
            (image.clone(), image.clone())
        );
        let other = located(Some('1'));
        assert!(other != image && !other.exists(), "{}", other.display());
    }
}
