//! Small disk that a test can fill.

use std::{path::Path, process::Command};

use anyhow::{Result, ensure};

/// File system of a few MiB, unmounted on drop.
#[derive(Debug)]
pub struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// Mounts an empty file system.
    ///
    /// # Errors
    /// The file system cannot be mounted.
    pub fn new(mib: u32) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let options = format!("size={mib}m,mode=0755");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "wrenn-e2e"])
            .arg(dir.path())
            .status()?;
        ensure!(mounted.success(), "failed to mount a tmpfs: {mounted}");
        Ok(Self(dir))
    }

    /// Returns the mount point.
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
