//! A disk that a test can fill.

use std::{path::Path, process::Command};

use anyhow::{Result, ensure};

/// A file system of a few MiB, unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// Mounts one, empty.
    ///
    /// # Errors
    /// If it cannot be mounted.
    pub fn new(mib: u32) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let options = format!("size={mib}m,mode=0755");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "wrenn-e2e"])
            .arg(dir.path())
            .status()?;
        ensure!(mounted.success(), "mount a tmpfs: {mounted}");
        Ok(Self(dir))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}
