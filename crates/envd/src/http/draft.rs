//! A file that takes its place when it is whole: whoever looks sees the old one or the new one, and what fails leaves the old one.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, fchown},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use super::error::HttpError;
use crate::{filesystem::entry, users::User};

/// Mode of a file that was not there before.
const MODE: u32 = 0o644;

/// A file beside its place. Gone when it is dropped, unless it took its place.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
    place: PathBuf,
    placed: bool,
}

impl Draft {
    /// Begins a file of a user, with the mode of the one that is in its place. A link there stays one: what it leads to is
    /// replaced. Missing directories are made.
    ///
    /// # Errors
    /// 400 if something else than a file is there; what the kernel says.
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
        fchown(&file, Some(user.uid), Some(user.gid)).map_err(failed)?;
        // After the owner: a change of that takes set-user-id bits away.
        file.set_permissions(fs::Permissions::from_mode(mode))
            .map_err(failed)?;
        Ok((draft, file))
    }

    /// Where it belongs, links resolved.
    #[must_use]
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// Puts it there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn take_place(mut self) -> Result<(), HttpError> {
        fs::rename(&self.path, &self.place).map_err(|e| HttpError::of_file(&self.place, &e))?;
        self.placed = true;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.placed {
            // Whatever comes of it, the file of this name is nobody's.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// 400 for what is not a regular file.
///
/// # Errors
/// As said.
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

/// A name that nobody else uses.
fn name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!(".envd-draft-{}-{number}", std::process::id())
}
