//! Empty disk files.

use std::{fs, path::Path, process::Stdio, time::Duration};

use tokio::process::Command;
// Path of the base image in the jail. Constant, so that a disk is valid in every jail.
use wrenn_jail::BASE_DISK;

use crate::{DiskError, error::failed};

/// Program that creates disks.
const PROGRAM: &str = "qemu-img";

/// Maximum run time of `qemu-img`. A typical run takes about 15 ms.
const DEADLINE: Duration = Duration::from_secs(30);

/// Creates an empty disk file at `path`. Only the user `uid` and root can open it. On failure, no
/// file is left.
///
/// # Errors
/// See [`DiskError`].
pub async fn create(path: &Path, size_mib: u32, uid: u32) -> Result<(), DiskError> {
    let made = make(path, size_mib, uid).await;
    if made.is_err() {
        // Best effort: the caller removes the directory as well.
        let _ = fs::remove_file(path);
    }
    made
}

async fn make(path: &Path, size_mib: u32, uid: u32) -> Result<(), DiskError> {
    // -u: the base image exists only inside the jail, so `qemu-img` cannot check it here. It reads
    // no disk file, so it needs no jail.
    let child = Command::new(PROGRAM)
        .args(["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b"])
        .arg(BASE_DISK)
        .arg(path)
        .arg(format!("{size_mib}M"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(DEADLINE, child)
        .await
        .map_err(|_| DiskError::Deadline {
            program: PROGRAM,
            deadline: DEADLINE,
        })?
        .map_err(|source| DiskError::Run {
            program: PROGRAM,
            package: "qemu-utils",
            source,
        })?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let text = text.trim().chars().take(500).collect();
        return Err(DiskError::Failed(PROGRAM, text));
    }
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(path, mode).map_err(failed("restrict access to"))?;
    std::os::unix::fs::chown(path, Some(uid), Some(uid)).map_err(failed("change the owner of"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::Header;

    #[tokio::test]
    async fn a_new_disk_is_sparse_private_to_its_user_and_of_the_form_that_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        create(&path, 5120, 1_900_000_001).await.unwrap();
        let meta = fs::metadata(&path).unwrap();
        assert_eq!(
            (meta.uid(), meta.gid(), meta.mode() & 0o777),
            (1_900_000_001, 1_900_000_001, 0o600)
        );
        assert!(meta.blocks() * 512 < 1024 * 1024);
        let header = Header::read(&path).unwrap();
        assert_eq!(header.size_bytes, 5120 << 20);
        assert_eq!(header.backing_file.as_deref(), Some(BASE_DISK));
    }

    #[tokio::test]
    async fn full_disk_is_distinguished_and_leaves_no_file() {
        // A file system of one page, too small for the header.
        wrenn_test_host::enter();
        let dir = tempfile::tempdir().unwrap();
        nix::mount::mount(
            Some("tmpfs"),
            dir.path(),
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some("size=4k"),
        )
        .unwrap();
        let error = create(&dir.path().join("disk"), 5120, 0).await.unwrap_err();
        assert!(error.is_out_of_space(), "{error:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let missing = dir.path().join("missing/disk");
        let error = create(&missing, 5120, 0).await.unwrap_err();
        assert!(!error.is_out_of_space(), "{error:?}");
    }
}
