//! Sandbox disks: one qcow2 overlay per sandbox, in the sandbox's directory, on the template's
//! image.
//!
//! Owns `rootfs.qcow2` and the read-only layers that snapshots split off while the VM ran. Never
//! touches the template's image. A failed create leaves no file.

mod measure;
mod merge;

use std::{fs, io, path::Path, process::Stdio, time::Duration};

use tokio::process::Command;
// Path of the template's image in the jail. Constant, so that a disk is valid in every jail.
use wrenn_jail::BASE_DISK;
use wrenn_proto::supervise::files;

use crate::sandbox_dir::SandboxDir;

pub(crate) use measure::visible_bytes;
pub(crate) use merge::merge;

/// Name of a merged layer in the directory of a staged snapshot.
pub(crate) const MERGED: &str = "disk.qcow2";

/// Program that creates disks.
const PROGRAM: &str = "qemu-img";

/// Maximum run time of `qemu-img`. A typical run takes about 15 ms.
const DEADLINE: Duration = Duration::from_secs(30);

/// Failure to create, merge or remove a disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum DiskError {
    /// A file operation failed.
    #[error("failed to {step} the sandbox's disk")]
    Io {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// A program could not be started.
    #[error("failed to run `{program}` (package {package})")]
    Run {
        program: &'static str,
        package: &'static str,
        #[source]
        source: io::Error,
    },
    /// A program failed. The text is what it reported.
    #[error("`{0}` failed: {1}")]
    Failed(&'static str, String),
    /// A program did not finish in time.
    #[error("`{program}` timed out after {deadline:?}")]
    Deadline {
        program: &'static str,
        deadline: Duration,
    },
}

impl DiskError {
    /// True if the host's disk is full.
    pub(crate) fn is_out_of_space(&self) -> bool {
        match self {
            Self::Io { source, .. } | Self::Run { source, .. } => {
                crate::host::is_out_of_space(source)
            }
            Self::Failed(_, text) => wrenn_qmp::is_out_of_space(text),
            Self::Deadline { .. } => false,
        }
    }
}

/// Creates the overlay in `sandbox_dir`. Only the user `uid` and root can open it.
pub(crate) async fn create(sandbox_dir: &Path, size_mib: u32, uid: u32) -> Result<(), DiskError> {
    create_at(&sandbox_dir.join(files::DISK), size_mib, uid).await
}

/// Creates an overlay at `path`.
pub(crate) async fn create_at(path: &Path, size_mib: u32, uid: u32) -> Result<(), DiskError> {
    let made = make(path, size_mib, uid).await;
    if made.is_err() {
        // Best effort: the caller removes the directory as well.
        let _ = fs::remove_file(path);
    }
    made
}

async fn make(path: &Path, size_mib: u32, uid: u32) -> Result<(), DiskError> {
    let mut command = Command::new(PROGRAM);
    // -u: the base image exists only inside the jail, so `qemu-img` cannot check it here.
    command
        .args(["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b"])
        .arg(BASE_DISK)
        .arg(path)
        .arg(format!("{size_mib}M"));
    run(command, DEADLINE).await?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(path, mode).map_err(failed("restrict access to"))?;
    std::os::unix::fs::chown(path, Some(uid), Some(uid)).map_err(failed("change the owner of"))
}

/// Runs `qemu-img` and returns what it prints.
async fn run(mut command: Command, deadline: Duration) -> Result<Vec<u8>, DiskError> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(deadline, child)
        .await
        .map_err(|_| DiskError::Deadline {
            program: PROGRAM,
            deadline,
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
    Ok(output.stdout)
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
    use std::os::unix::fs::MetadataExt as _;

    #[tokio::test]
    async fn overlay_is_sparse_and_private_to_its_user() {
        let data = tempfile::tempdir().unwrap();
        let sandbox_dirs = crate::sandbox_dir::SandboxDirs::open(data.path()).unwrap();
        let sandbox_dir = sandbox_dirs.claim(&"sb-1".parse().unwrap()).unwrap();
        let dir = sandbox_dir.clone();
        create(dir.path(), 5120, 1_900_000_001).await.unwrap();
        let path = dir.path().join(files::DISK);
        let meta = fs::metadata(&path).unwrap();
        assert_eq!(
            (meta.uid(), meta.gid(), meta.mode() & 0o777),
            (1_900_000_001, 1_900_000_001, 0o600)
        );
        assert!(meta.blocks() * 512 < 1024 * 1024);
        let info = Command::new("qemu-img")
            .args(["info", "-U", "--output=json"])
            .arg(&path)
            .output()
            .await
            .unwrap();
        let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
        assert_eq!(info["virtual-size"], 5120_u64 * 1024 * 1024);
        assert_eq!(info["backing-filename"], BASE_DISK);
        let next = sandbox_dir.next_disk();
        create_at(&next, 5120, 1_900_000_001).await.unwrap();
        remove(&sandbox_dir).unwrap();
        remove(&sandbox_dir).unwrap();
        assert!(!path.exists() && !next.exists());
    }

    #[tokio::test]
    async fn full_disk_is_distinguished_and_leaves_no_file() {
        // A file system of one page, too small for the overlay's header.
        crate::private_host::enter();
        let dir = tempfile::tempdir().unwrap();
        nix::mount::mount(
            Some("tmpfs"),
            dir.path(),
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some("size=4k"),
        )
        .unwrap();
        let error = create(dir.path(), 5120, 0).await.unwrap_err();
        assert!(error.is_out_of_space(), "{error:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let error = create(&dir.path().join("missing"), 5120, 0)
            .await
            .unwrap_err();
        assert!(!error.is_out_of_space(), "{error:?}");
    }
}
