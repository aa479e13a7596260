//! Logs of sandboxes: of those that exist, and of those that failed and were removed.
//!
//! ```text
//! <data>/logs/<id>/   0700   supervisor.log, supervisor.log.1, console.log
//! ```
//!
//! The directory of a failed sandbox is removed as soon as the control plane knows of the failure.
//! Before, the logs are moved here. Those of the newest [`MAX_KEPT`] such sandboxes are kept; each
//! log is bounded by its writer.

use std::{
    fs, io,
    io::Read as _,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use wrenn_model::SandboxId;
use wrenn_proto::supervise::files;

use crate::sandbox_dir::SandboxDir;

/// Maximum number of removed sandboxes whose logs are kept.
const MAX_KEPT: usize = 100;

/// Maximum number of bytes that are read of one file. Writers keep within it.
const MAX_READ_BYTES: u64 = 2 * 1024 * 1024;

/// Log of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogSource {
    /// Supervisor and VMM.
    Supervisor,
    /// Serial console of the guest.
    Console,
}

impl LogSource {
    /// Names of the files, oldest first.
    const fn files(self) -> &'static [&'static str] {
        match self {
            Self::Supervisor => &[files::OLD_LOG, files::LOG],
            Self::Console => &[files::CONSOLE],
        }
    }
}

/// Logs of removed sandboxes of one agent.
#[derive(Debug)]
pub(crate) struct SandboxLogs(PathBuf);

impl SandboxLogs {
    pub(crate) fn of(data_dir: &Path) -> Self {
        Self(data_dir.join("logs"))
    }

    /// Moves the logs out of the directory of a sandbox that failed and is to be removed. Logs are
    /// only for diagnosis, so a failure is logged and not returned.
    pub(crate) fn keep(&self, sandbox_dir: &SandboxDir, id: &SandboxId) {
        if let Err(error) = self.try_keep(sandbox_dir, id) {
            tracing::warn!(%error, "failed to keep the logs of a failed sandbox");
        }
    }

    fn try_keep(&self, sandbox_dir: &SandboxDir, id: &SandboxId) -> io::Result<()> {
        let kept = self.0.join(id);
        for source in [LogSource::Supervisor, LogSource::Console] {
            for name in source.files() {
                let from = sandbox_dir.path().join(name);
                if !from.exists() {
                    continue;
                }
                fs::DirBuilder::new()
                    .mode(0o700)
                    .recursive(true)
                    .create(&kept)?;
                fs::rename(from, kept.join(name))?;
            }
        }
        self.remove_oldest()
    }

    fn remove_oldest(&self) -> io::Result<()> {
        let mut all: Vec<(SystemTime, PathBuf)> = Vec::new();
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            all.push((entry.metadata()?.modified()?, entry.path()));
        }
        all.sort();
        let surplus = all.len().saturating_sub(MAX_KEPT);
        for (_, path) in all.drain(..surplus) {
            match fs::remove_dir_all(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Returns a log of a sandbox, whether it exists or failed and was removed. `None` if there is
    /// no such log.
    pub(crate) fn read(
        &self,
        sandbox_dir: &SandboxDir,
        id: &SandboxId,
        source: LogSource,
    ) -> io::Result<Option<Vec<u8>>> {
        for dir in [sandbox_dir.path(), &self.0.join(id)] {
            let mut log = None;
            for name in source.files() {
                let file = match fs::File::open(dir.join(name)) {
                    Ok(file) => file,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(error),
                };
                let log = log.get_or_insert_with(Vec::new);
                file.take(MAX_READ_BYTES).read_to_end(log)?;
            }
            if log.is_some() {
                return Ok(log);
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::sandbox_dir::SandboxDirs;

    fn id(n: usize) -> SandboxId {
        format!("sb-{n}").parse().unwrap()
    }

    #[test]
    fn logs_of_a_removed_sandbox_are_read_like_those_of_another() {
        let data = tempfile::tempdir().unwrap();
        let logs = SandboxLogs::of(data.path());
        let dirs = SandboxDirs::open(data.path()).unwrap();
        let dir = dirs.claim(&id(1)).unwrap();
        let read = |source| logs.read(&dir, &id(1), source).unwrap();
        assert_eq!(read(LogSource::Supervisor), None);
        fs::write(dir.path().join(files::OLD_LOG), "old\n").unwrap();
        fs::write(dir.path().join(files::LOG), "new\n").unwrap();
        fs::write(dir.path().join(files::CONSOLE), "console").unwrap();
        for removes in [false, true] {
            if removes {
                logs.keep(&dir, &id(1));
                dir.remove().unwrap();
            }
            let log = read(LogSource::Supervisor).unwrap();
            assert_eq!(log, b"old\nnew\n");
            assert_eq!(read(LogSource::Console).unwrap(), b"console");
        }
    }

    #[test]
    fn logs_of_the_newest_sandboxes_only_are_kept() {
        let data = tempfile::tempdir().unwrap();
        let logs = SandboxLogs::of(data.path());
        let dirs = SandboxDirs::open(data.path()).unwrap();
        // A sandbox without logs is not counted.
        logs.keep(&dirs.claim(&id(0)).unwrap(), &id(0));
        for n in 1..=MAX_KEPT + 2 {
            let dir = dirs.claim(&id(n)).unwrap();
            fs::write(dir.path().join(files::LOG), "line\n").unwrap();
            logs.keep(&dir, &id(n));
            let kept = data.path().join("logs").join(id(n));
            // Timestamps of files are coarse.
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(n as u64);
            fs::File::open(kept).unwrap().set_modified(time).unwrap();
        }
        let read = |n| {
            let dir = dirs.sandbox_dir(&id(n));
            logs.read(&dir, &id(n), LogSource::Supervisor).unwrap()
        };
        assert_eq!(
            fs::read_dir(data.path().join("logs")).unwrap().count(),
            MAX_KEPT
        );
        assert_eq!(read(1), None);
        assert!(read(MAX_KEPT + 2).is_some());
    }
}
