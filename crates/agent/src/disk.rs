//! Disk files of sandboxes, in their directories: `rootfs.qcow2` and the read-only layers that
//! snapshots split off while the VM ran. Never touches the template's image.

use std::{fs, io, path::Path};

use wrenn_disk::DiskError;
use wrenn_proto::supervise::files;

use crate::sandbox_dir::SandboxDir;

/// Name of a merged layer in the directory of a staged snapshot.
pub(crate) const MERGED: &str = "disk.qcow2";

/// Creates the overlay in `sandbox_dir`. Only the user `uid` and root can open it.
pub(crate) async fn create(sandbox_dir: &Path, size_mib: u32, uid: u32) -> Result<(), DiskError> {
    wrenn_disk::create(&sandbox_dir.join(files::DISK), size_mib, uid).await
}

/// Removes all files of the disk. Succeeds if there are none.
pub(crate) fn remove(sandbox_dir: &SandboxDir) -> Result<(), DiskError> {
    let files = match sandbox_dir.disks() {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("find")(error)),
    };
    for path in files {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove")(error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn failed(step: &'static str) -> impl FnOnce(io::Error) -> DiskError {
    move |source| DiskError::Io { step, source }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_files_of_a_disk_are_removed() {
        let data = tempfile::tempdir().unwrap();
        let sandbox_dirs = crate::sandbox_dir::SandboxDirs::open(data.path()).unwrap();
        let sandbox_dir = sandbox_dirs.claim(&"sb-1".parse().unwrap()).unwrap();
        create(sandbox_dir.path(), 128, 0).await.unwrap();
        let next = sandbox_dir.next_disk();
        wrenn_disk::create(&next, 128, 0).await.unwrap();
        assert_eq!(sandbox_dir.disks().unwrap().len(), 2);
        remove(&sandbox_dir).unwrap();
        remove(&sandbox_dir).unwrap();
        assert!(sandbox_dir.disks().unwrap().is_empty());
    }
}
