//! Draft of a file: written beside its destination, then renamed over it when complete. Readers see
//! the old file or the new one. A failure leaves the old file.
//!
//! A file that is a value of the kernel, such as `/proc/sys/…`, cannot be replaced. Its draft is the
//! file itself.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, fchown},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{
    filesystem::{entry, mount},
    http_error::HttpError,
    users::User,
};

/// Mode of a file that did not exist before.
const MODE: u32 = 0o644;

/// Draft beside its destination. Dropping the draft removes it, unless it has replaced the
/// destination.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
    place: PathBuf,
    /// True if the draft has replaced the destination, or is the destination itself.
    placed: bool,
}

impl Draft {
    /// Creates a draft for a user, with the mode of the existing file. If the destination is a
    /// symbolic link, the link stays and its target is replaced. Creates missing directories.
    ///
    /// # Errors
    /// 400 if something that is not a regular file exists at the destination, else the kernel's
    /// error.
    pub fn begin(place: &Path, user: &User) -> Result<(Self, File), HttpError> {
        let there = fs::metadata(place);
        let mode = match &there {
            Ok(there) => {
                refuse_irregular(place, there)?;
                there.permissions().mode() & 0o7777
            }
            Err(_) => MODE,
        };
        let place = fs::canonicalize(place).unwrap_or_else(|_| place.to_owned());
        let failed = |error: io::Error| HttpError::of_file(&place, &error);
        if there.is_ok() && mount::is_kernel(&place) {
            let file = File::options().write(true).open(&place).map_err(failed)?;
            let draft = Self {
                path: place.clone(),
                place: place.clone(),
                placed: true,
            };
            return Ok((draft, file));
        }
        let parent = place.parent().unwrap_or(Path::new("/"));
        entry::make_directories(parent, user).map_err(failed)?;
        let path = parent.join(name());
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(MODE)
            .open(&path)
            .map_err(failed)?;
        let draft = Self {
            path,
            place: place.clone(),
            placed: false,
        };
        let owned = fchown(&file, Some(user.uid), Some(user.gid));
        mount::tolerate(owned, &file).map_err(failed)?;
        // Set after the owner, because a change of the owner clears the set-user-id bits.
        let set = file.set_permissions(fs::Permissions::from_mode(mode));
        mount::tolerate(set, &file).map_err(failed)?;
        Ok((draft, file))
    }

    /// Destination, with symbolic links resolved.
    #[must_use]
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// Replaces the destination by the draft.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn take_place(mut self) -> Result<(), HttpError> {
        if self.placed {
            return Ok(());
        }
        fs::rename(&self.path, &self.place).map_err(|e| HttpError::of_file(&self.place, &e))?;
        self.placed = true;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.placed {
            // Errors are ignored: no other program uses a file of this name.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Rejects everything that is not a regular file.
///
/// # Errors
/// 400 if the file is not a regular file.
pub fn refuse_irregular(path: &Path, metadata: &Metadata) -> Result<(), HttpError> {
    let path = path.display();
    if metadata.is_dir() {
        return Err(HttpError::bad_request(format!(
            "path '{path}' is a directory"
        )));
    }
    if !metadata.is_file() {
        return Err(HttpError::bad_request(format!(
            "path '{path}' is not a regular file"
        )));
    }
    Ok(())
}

/// Returns an unused file name.
fn name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!(".envd-draft-{}-{number}", std::process::id())
}
