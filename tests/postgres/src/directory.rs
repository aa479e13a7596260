//! Directory of a server, removed with it.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use crate::command::give_away;

const PREFIX: &str = "wrenn-postgres-";

/// Locked by the process that owns the directory.
const LOCK: &str = "lock";

/// Directory that the user of the server can write to. Its path is short, because the path of a Unix
/// socket has at most 107 bytes.
pub(crate) struct Directory {
    dir: TempDir,
    _lock: File,
}

impl Directory {
    /// Creates a directory, and removes those of processes that have ended.
    pub(crate) fn new() -> Result<Self> {
        sweep();
        let dir = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir()
            .context("failed to create the directory of a server")?;
        // Another process must not find the lock file before it is locked.
        let new = dir.path().join("lock.new");
        let lock = File::create(&new).context("failed to create a lock file")?;
        lock.lock().context("failed to lock a lock file")?;
        fs::rename(&new, dir.path().join(LOCK)).context("failed to rename a lock file")?;
        give_away(dir.path())?;
        Ok(Self { dir, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Removes the directories of processes that were killed. A directory without a lock file is being
/// created, or removed by another process.
fn sweep() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else {
        return;
    };
    let named = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(PREFIX)
    };
    for path in entries.flatten().map(|entry| entry.path()).filter(named) {
        if let Ok(lock) = File::open(path.join(LOCK))
            && lock.try_lock().is_ok()
        {
            _ = fs::remove_dir_all(&path);
        }
    }
}
