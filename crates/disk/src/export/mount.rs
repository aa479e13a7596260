//! Directory of an export, with the file on which FUSE is mounted.
//!
//! | name        | content                                                             |
//! |-------------|---------------------------------------------------------------------|
//! | `raw`       | the raw file, by FUSE                                               |
//! | `overlays/` | links to overlays that were added later, visible in the jail         |
//!
//! The mount is in the mount namespace of the calling thread. It outlives a process that is killed,
//! and then fails every request until it is removed.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::PermissionsExt as _,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    mount::{MountFlags, UnmountFlags},
};

use crate::{DiskError, error::failed};

/// Device of the kernel's FUSE. Only root needs access to it.
const DEVICE: &str = "/dev/fuse";

/// Type and source of the mount. Only the part before the dot has a meaning for the kernel.
const KIND: &str = "fuse.wrenn-disk";
const SOURCE: &str = "wrenn-disk";

/// Access to the directories: all users may use names in them, and only root may add some. The
/// reader and the exporter are different users.
const MODE: u32 = 0o711;

/// Mounted raw file. The mount and the directory are removed on drop.
#[derive(Debug)]
pub(super) struct Mount {
    dir: PathBuf,
    is_removed: bool,
}

impl Mount {
    /// Creates the directory, and mounts FUSE for the user and group `reader_uid`. Returns the
    /// descriptor of the connection. Requests wait until it is answered, and fail once it is closed.
    pub(super) fn new(dir: &Path, reader_uid: u32) -> Result<(Self, OwnedFd), DiskError> {
        remove(dir)?;
        let mount = Self {
            dir: dir.to_owned(),
            is_removed: false,
        };
        mount
            .create_dirs()
            .map_err(failed("create a directory for the raw view of"))?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let fuse = rustix::fs::open(DEVICE, flags, Mode::empty())
            .map_err(io::Error::from)
            .map_err(failed("open `/dev/fuse` for the raw view of"))?;
        mount
            .attach(&fuse, reader_uid)
            .map_err(failed("mount the raw view of"))?;
        Ok((mount, fuse))
    }

    /// Returns the path of the raw file.
    pub(super) fn raw(&self) -> PathBuf {
        raw(&self.dir)
    }

    /// Returns the directory with the overlays that were added later.
    pub(super) fn overlays(&self) -> PathBuf {
        self.dir.join("overlays")
    }

    /// Removes the mount and the directory.
    pub(super) fn remove(mut self) -> Result<(), DiskError> {
        // Not tried again on drop.
        self.is_removed = true;
        remove(&self.dir)
    }

    fn create_dirs(&self) -> io::Result<()> {
        for dir in [&self.dir, &self.overlays()] {
            fs::create_dir(dir)?;
            fs::set_permissions(dir, fs::Permissions::from_mode(MODE))?;
        }
        fs::File::create(self.raw())?;
        Ok(())
    }

    /// Mounts without `allow_other`, which leaves the file to one user, and without
    /// `default_permissions`, so that the owner which the exporter reports has no effect.
    fn attach(&self, fuse: &OwnedFd, reader: u32) -> io::Result<()> {
        let fd = fuse.as_raw_fd();
        let options = format!("fd={fd},rootmode=100000,user_id={reader},group_id={reader}");
        let options = CString::new(options)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount(SOURCE, self.raw(), KIND, flags, options.as_c_str())?;
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.is_removed {
            // Best effort: the next export in this directory, or its owner, removes what is left.
            let _ = remove(&self.dir);
        }
    }
}

/// Removes the directory of an export whose process was killed, with its mount. Not an error if
/// there is none.
///
/// # Errors
/// `Io` with the kernel's error.
pub fn remove(dir: &Path) -> Result<(), DiskError> {
    unmount(&raw(dir)).map_err(failed("unmount the raw view of"))?;
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed("remove the directory of the raw view of")(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn unmount(path: &Path) -> io::Result<()> {
    loop {
        // Sends no request to the exporter, and does not wait for readers.
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point, or no file.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn raw(dir: &Path) -> PathBuf {
    dir.join("raw")
}
