//! Directory of a sandbox: its persistent state on this host, across restarts of the agent.
//!
//! ```text
//! <data>/sandboxes/<id>/   0700
//!   installation.json      the installation that owns the sandbox; absent for sandboxes of
//!                          release 0.1.0
//!   spec.json              written last before the supervisor starts; without it, the create is
//!                          incomplete
//!   boot.json              written when the guest first answered; without it, the sandbox never
//!                          ran
//!   snapshot.json          the last snapshot, and whether the sandbox kept running after it; if
//!                          not, the sandbox is paused
//!   rootfs.qcow2           the disk; `rootfs.<n>.qcow2` after a snapshot of the running sandbox
//!   status.json, supervisor.sock, console.log, supervisor.log, supervisor.log.1   written by the
//!                          supervisor; `sandbox_logs` keeps the logs of failed sandboxes
//! ```
//!
//! Files are replaced atomically: written under another name, flushed, renamed.
//! [`SandboxDir::remove`] removes `snapshot.json` and `spec.json` first, so a partially removed
//! directory is never taken for a sandbox.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use wrenn_model::SandboxId;
use wrenn_proto::supervise::{FinalStatus, SupervisorSpec, files};

/// File name of [`BootTimes`].
const BOOT: &str = "boot.json";

/// File name of [`LastSnapshot`].
const LAST: &str = "snapshot.json";

/// File with the id of the installation that owns the sandbox.
const INSTALLATION: &str = "installation.json";

/// Prefix and suffix of the names of disk files.
const DISK_NAME: (&str, &str) = ("rootfs.", "qcow2");

/// Failure to create or use a sandbox's directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SandboxDirError {
    /// A directory with this name exists.
    #[error("sandbox {0} already exists")]
    Exists(SandboxId),
    /// A file operation failed.
    #[error("failed to {step} {path}")]
    Io {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The content of a file is invalid.
    #[error("failed to parse {path}")]
    Malformed {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

impl SandboxDirError {
    /// True if the file exists but cannot be read now, because the disk failed or no file
    /// descriptor is left. A later attempt may succeed.
    pub(crate) fn is_unreadable(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() != io::ErrorKind::NotFound)
    }

    /// True if the host's disk is full.
    pub(crate) fn is_out_of_space(&self) -> bool {
        matches!(self, Self::Io { source, .. } if crate::host::is_out_of_space(source))
    }
}

/// Durations of the phases of a boot, in milliseconds since the start of the create. 0 if unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct BootTimes {
    pub(crate) prepared_ms: u32,
    pub(crate) vmm_started_ms: u32,
    pub(crate) kernel_ms: u32,
    pub(crate) init_ms: u32,
    pub(crate) envd_ms: u32,
}

/// Last complete snapshot of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LastSnapshot {
    /// ID of the snapshot.
    pub(crate) build: String,
    /// Time when this record was made, in milliseconds since the Unix epoch.
    #[serde(rename = "frozen_unix_ms")]
    pub(crate) recorded_unix_ms: i64,
    /// True if the VM kept running after the snapshot, or was resumed since. If false, the sandbox
    /// is paused.
    pub(crate) running: bool,
}

/// Sandbox directories of one agent.
#[derive(Debug, Clone)]
pub(crate) struct SandboxDirs {
    root: PathBuf,
}

/// Directory of one sandbox.
#[derive(Debug, Clone)]
pub(crate) struct SandboxDir {
    path: PathBuf,
}

impl SandboxDirs {
    /// Opens the sandbox directories of a data directory.
    pub(crate) fn open(data_dir: &Path) -> Result<Self, SandboxDirError> {
        let root = data_dir.join("sandboxes");
        fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(&root)
            .map_err(failed("create", &root))?;
        Ok(Self { root })
    }

    /// Creates the directory of a new sandbox.
    pub(crate) fn claim(&self, id: &SandboxId) -> Result<SandboxDir, SandboxDirError> {
        let path = self.root.join(id);
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => Ok(SandboxDir { path }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(SandboxDirError::Exists(id.clone()))
            }
            Err(error) => Err(failed("create", &path)(error)),
        }
    }

    /// Returns the directory of a sandbox, whether it exists or not.
    pub(crate) fn sandbox_dir(&self, id: &SandboxId) -> SandboxDir {
        SandboxDir {
            path: self.root.join(id),
        }
    }

    /// Returns the last snapshot of each sandbox that has one.
    pub(crate) fn last_snapshots(&self) -> Result<Vec<LastSnapshot>, SandboxDirError> {
        let sandbox_dirs = self.list()?.into_iter();
        let snapshots = sandbox_dirs.map(|(_, sandbox_dir)| sandbox_dir.read_last());
        snapshots.filter_map(Result::transpose).collect()
    }

    /// Returns all sandbox directories. Entries whose name is not a sandbox ID are skipped.
    pub(crate) fn list(&self) -> Result<Vec<(SandboxId, SandboxDir)>, SandboxDirError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(failed("list", &self.root))? {
            let entry = entry.map_err(failed("list", &self.root))?;
            let name = entry.file_name();
            match name.to_str().map(str::parse) {
                Some(Ok(id)) => found.push((id, SandboxDir { path: entry.path() })),
                _ => tracing::warn!(path = %entry.path().display(), "not a sandbox, ignored"),
            }
        }
        Ok(found)
    }
}

impl SandboxDir {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn write_spec(&self, spec: &SupervisorSpec) -> Result<(), SandboxDirError> {
        self.write_json(files::SPEC, spec)
    }

    pub(crate) fn read_spec(&self) -> Result<SupervisorSpec, SandboxDirError> {
        let path = self.path.join(files::SPEC);
        let text = fs::read(&path).map_err(failed("read", &path))?;
        serde_json::from_slice(&text).map_err(|source| SandboxDirError::Malformed { path, source })
    }

    /// Records the installation that owns the sandbox.
    pub(crate) fn write_installation(&self, id: &str) -> Result<(), SandboxDirError> {
        self.write_json(INSTALLATION, &id)
    }

    /// Returns the installation that owns the sandbox; empty if none is recorded.
    pub(crate) fn read_installation(&self) -> String {
        let text = fs::read(self.path.join(INSTALLATION)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    pub(crate) fn write_boot(&self, boot: &BootTimes) -> Result<(), SandboxDirError> {
        self.write_json(BOOT, boot)
    }

    /// Returns `None` if the guest never answered.
    pub(crate) fn read_boot(&self) -> Option<BootTimes> {
        let text = fs::read(self.path.join(BOOT)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    pub(crate) fn write_last(&self, last: &LastSnapshot) -> Result<(), SandboxDirError> {
        self.write_json(LAST, last)
    }

    /// True if the sandbox has a snapshot, whether its record is readable or not.
    pub(crate) fn has_last_snapshot(&self) -> bool {
        self.path.join(LAST).exists()
    }

    /// Returns `None` if the sandbox has no snapshot.
    pub(crate) fn read_last(&self) -> Result<Option<LastSnapshot>, SandboxDirError> {
        let path = self.path.join(LAST);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        let last = serde_json::from_slice(&text);
        last.map(Some)
            .map_err(|source| SandboxDirError::Malformed { path, source })
    }

    /// Returns a path for the next disk file.
    pub(crate) fn next_disk(&self) -> PathBuf {
        let free = (1_u32..).map(|n| {
            self.path
                .join(format!("{}{n}.{}", DISK_NAME.0, DISK_NAME.1))
        });
        free.into_iter()
            .find(|path| !path.exists())
            .unwrap_or_else(|| self.path.join(files::DISK))
    }

    /// Returns all disk files in the directory.
    pub(crate) fn disks(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(DISK_NAME.0) && name.ends_with(DISK_NAME.1) {
                found.push(entry.path());
            }
        }
        Ok(found)
    }

    /// Removes the final status of an earlier VM of the sandbox.
    pub(crate) fn forget_final_status(&self) -> Result<(), SandboxDirError> {
        let path = self.path.join(files::STATUS);
        ignore_missing(fs::remove_file(&path)).map_err(failed("remove", &path))
    }

    /// Returns the supervisor's final status. `None` if the supervisor could not write one.
    pub(crate) fn read_final_status(&self) -> Option<FinalStatus> {
        let text = fs::read(self.path.join(files::STATUS)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Returns the end of a log, for use in a message. Empty if there is no log.
    pub(crate) fn tail(&self, file: &str, bytes: usize) -> String {
        let text = fs::read(self.path.join(file)).unwrap_or_default();
        let start = text.len().saturating_sub(bytes);
        String::from_utf8_lossy(&text[start..]).trim().to_owned()
    }

    /// Removes everything. Succeeds if there is nothing.
    ///
    /// The order determines what the next agent finds if this agent is killed in between: first a
    /// sandbox without a snapshot, then an incomplete create, which is also removed. A sandbox with
    /// a snapshot and an unreadable specification would be left alone.
    pub(crate) fn remove(&self) -> Result<(), SandboxDirError> {
        for file in [LAST, files::SPEC] {
            let path = self.path.join(file);
            ignore_missing(fs::remove_file(&path)).map_err(failed("remove", &path))?;
        }
        ignore_missing(fs::remove_dir_all(&self.path)).map_err(failed("remove", &self.path))
    }

    fn write_json(
        &self,
        name: &'static str,
        value: &impl Serialize,
    ) -> Result<(), SandboxDirError> {
        let path = self.path.join(name);
        let text = serde_json::to_vec_pretty(value).map_err(io::Error::from);
        text.and_then(|text| wrenn_durable::replace(&path, &text, 0o600))
            .map_err(failed("write", &path))
    }
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SandboxDirError {
    let path = path.to_owned();
    move |source| SandboxDirError::Io { step, path, source }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn id() -> SandboxId {
        "sb-1".parse().unwrap()
    }

    #[test]
    fn directory_is_claimed_once_and_removed_completely() {
        let data = tempfile::tempdir().unwrap();
        let sandbox_dirs = SandboxDirs::open(data.path()).unwrap();
        let sandbox_dir = sandbox_dirs.claim(&id()).unwrap();
        assert!(matches!(
            sandbox_dirs.claim(&id()),
            Err(SandboxDirError::Exists(_))
        ));
        assert!(sandbox_dir.read_spec().is_err() && sandbox_dir.read_boot().is_none());
        let boot = BootTimes {
            envd_ms: 5,
            ..BootTimes::default()
        };
        sandbox_dir.write_boot(&boot).unwrap();
        assert_eq!(sandbox_dir.read_boot(), Some(boot));
        fs::write(data.path().join("sandboxes/not a sandbox"), "").unwrap();
        assert_eq!(sandbox_dirs.list().unwrap().len(), 1);
        sandbox_dir.remove().unwrap();
        sandbox_dir.remove().unwrap();
        assert!(sandbox_dirs.list().unwrap().is_empty());
    }

    #[test]
    fn a_log_is_cut_to_its_end() {
        let data = tempfile::tempdir().unwrap();
        let sandbox_dir = SandboxDirs::open(data.path())
            .unwrap()
            .claim(&id())
            .unwrap();
        fs::write(sandbox_dir.path().join(files::LOG), "first\nlast\n").unwrap();
        assert_eq!(sandbox_dir.tail(files::LOG, 5), "last");
        assert_eq!(sandbox_dir.tail(files::CONSOLE, 5), "");
    }
}
