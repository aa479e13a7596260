//! Files that are replaced as a whole and survive a power failure.
//!
//! A [`Draft`] is a temporary file in the directory of its destination. The draft is flushed before
//! it gets its name; otherwise the name could refer to an incomplete file after a power failure.
//! The directory is flushed afterwards; otherwise the file could be missing. Readers see the old
//! file or the new one. A failure leaves the old file, and no temporary file.
//!
//! A process that is killed may leave a temporary file, `.NAME.XXXXXX.tmp`. It is never read.
//!
//! Calls block. Modes are reduced by the process's umask.
#![forbid(unsafe_code)]

use std::{
    ffi::OsString,
    fs::{self, File, Permissions},
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

/// Maximum length of a file name that becomes part of its draft's name, in bytes.
const MAX_NAME_BYTES: usize = 200;

/// File that is being written, without its name. Dropping it removes it.
#[derive(Debug)]
pub struct Draft {
    file: NamedTempFile,
    destination: PathBuf,
}

impl Draft {
    /// Creates a draft with a mode.
    ///
    /// # Errors
    /// Fails if no file can be created in the directory of `destination`.
    pub fn new(destination: &Path, mode: u32) -> io::Result<Self> {
        let mut prefix = OsString::from(".");
        // A name has at most 255 bytes, and the draft's name is longer by 12.
        let name = destination.file_name().unwrap_or_default();
        prefix.push(if name.len() <= MAX_NAME_BYTES {
            name
        } else {
            "long-name".as_ref()
        });
        prefix.push(".");
        let file = tempfile::Builder::new()
            .prefix(&prefix)
            .suffix(".tmp")
            .permissions(Permissions::from_mode(mode))
            .tempfile_in(directory(destination))?;
        Ok(Self {
            file,
            destination: destination.to_owned(),
        })
    }

    /// File to write to.
    pub fn file(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Gives the draft its name, and removes the file that had the name.
    ///
    /// # Errors
    /// Fails if the draft cannot be flushed or renamed. The earlier file stays, unless only the
    /// directory cannot be flushed.
    pub fn replace(self) -> io::Result<()> {
        self.file.as_file().sync_all()?;
        self.file.persist(&self.destination)?;
        sync_dir(directory(&self.destination))
    }

    /// Gives the draft its name, unless a file has this name.
    ///
    /// # Errors
    /// Fails with `AlreadyExists` if a file has the name; otherwise as [`replace`](Self::replace).
    pub fn create(self) -> io::Result<()> {
        self.file.as_file().sync_all()?;
        self.file.persist_noclobber(&self.destination)?;
        sync_dir(directory(&self.destination))
    }
}

/// Writes a file, and replaces the one that exists.
///
/// # Errors
/// See [`Draft::replace`].
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut draft = Draft::new(path, mode)?;
    draft.file().write_all(content)?;
    draft.replace()
}

/// Writes a file that does not exist yet. Of several concurrent calls for a path, one succeeds.
///
/// # Errors
/// See [`Draft::create`].
pub fn create(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut draft = Draft::new(path, mode)?;
    draft.file().write_all(content)?;
    draft.create()
}

/// Renames a file or directory whose content is flushed, and flushes the new directory.
///
/// # Errors
/// Returns the kernel's error.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync_dir(directory(to))
}

/// Flushes a directory, so that names that were added to it are durable.
///
/// # Errors
/// Returns the kernel's error.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Returns the directory of a path.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests;
