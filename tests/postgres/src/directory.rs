//! Directory of a server, removed with it.

use std::{
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};

use crate::command::give_away;

/// Script that removes a directory when the script's standard input ends. Repeats the removal while
/// the server still writes files there.
const REMOVE: &str = r#"read -r _; until rm -rf -- "$1"; do sleep 0.1; done"#;

/// Directory that the user of the server can write to. Its path is short, because the path of a
/// Unix socket has at most 107 bytes.
pub(crate) struct Directory {
    path: PathBuf,
    /// Process that removes the directory after this process has ended, even if the process group
    /// was killed: the other end of the pipe then closes.
    remover: Child,
}

impl Directory {
    pub(crate) fn new() -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("wrenn-postgres-")
            .tempdir()
            .context("failed to create the directory of a server")?;
        give_away(dir.path())?;
        let remover = Command::new("sh")
            .args(["-c", REMOVE, "remover"])
            .arg(dir.path())
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("failed to start `sh`")?;
        Ok(Self {
            path: dir.keep(),
            remover,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Closes the pipe first.
        _ = self.remover.wait();
    }
}
