//! Files of the image directory that snapshots depend on: kernel, initial RAM disk, and the image
//! at the base of the disk.
//!
//! A manifest names them by their content, so that they are found wherever they are in the image
//! directory, and an image that was built again is another one. It also has the former path, relative
//! to the image directory, where a file is looked for first.
//!
//! A manifest of version 1 has only the path: absolute in release 0.1.0, and for a file outside of
//! the image directory. Such a file is found after a move, too: its name and the names of the two
//! directories above it are those of the image store ([`former`]).

mod contents;
mod former;

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use wrenn_snapshot::{ImageFile, Manifest};
use wrenn_store::{Kind, LocalStore};

use contents::Contents;

/// Directories of the image store that contain these files.
const KINDS: [&str; 2] = ["kernels", "rootfs"];

/// Extension of the path of an image that was replaced by another one. No file has it.
const REPLACED: &str = "replaced-since-the-snapshot";

/// Store that a manifest is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holder {
    /// The store in the data directory, whose snapshots may depend on another image directory.
    DataDir,
    /// The store in the image directory, whose snapshots depend on that directory.
    ImageDir,
}

/// Names and paths of the files in one image directory.
#[derive(Debug)]
pub(super) struct ImageFiles {
    root: PathBuf,
    contents: Contents,
    /// Directory of files from an object store ([`Self::loaded`]).
    loaded: PathBuf,
}

impl ImageFiles {
    /// Returns the files of an image directory, and those that were loaded to `loaded`.
    pub(super) fn of(images_dir: &Path, loaded: &Path) -> Self {
        Self {
            root: images_dir.to_owned(),
            contents: Contents::default(),
            loaded: loaded.to_owned(),
        }
    }

    /// Returns the store of files from an object store, which the image directory does not have.
    pub(super) fn loaded(&self) -> Result<LocalStore, wrenn_store::StoreError> {
        LocalStore::open(&self.loaded)
    }

    /// True if files were loaded from an object store.
    pub(super) fn has_loaded(&self) -> bool {
        self.loaded.exists()
    }

    /// Replaces the paths of a new manifest by names, and describes the content of the files. A file
    /// that cannot be read keeps only its path.
    pub(super) fn describe(&self, manifest: &mut Manifest) {
        for (kind, file) in files(manifest) {
            file.artifact = self.contents.artifact(kind, &file.path);
            if let Some(name) = self.name_of(&file.path) {
                file.path = name;
            }
        }
    }

    /// Replaces the names of a stored manifest by paths.
    pub(super) fn locate(&self, manifest: &mut Manifest, holder: Holder) {
        let created_unix_ms = manifest.created_unix_ms;
        for (kind, file) in files(manifest) {
            file.path = match file.artifact {
                Some(_) => self.located(kind, file),
                None => self.located_by_path(file, kind, holder, created_unix_ms),
            };
        }
    }

    /// Returns the path of a file that is named by its content.
    fn located(&self, kind: Kind, file: &ImageFile) -> PathBuf {
        if let Some(found) = self.find(file, kind) {
            return found;
        }
        let missing = self.root.join(&file.path);
        match missing.exists() {
            // An image that was built again is another one: the snapshot's counts as missing.
            true => missing.with_extension(REPLACED),
            false => missing,
        }
    }

    /// Finds a file that is named by its content. The image directory is searched only if the file
    /// is at none of the likely places.
    pub(super) fn find(&self, file: &ImageFile, kind: Kind) -> Option<PathBuf> {
        let is_same = |path: &PathBuf| {
            path.is_absolute() && self.contents.artifact(kind, path) == file.artifact
        };
        let artifact = file.artifact.as_ref()?;
        let loaded = self.loaded.join(kind.name()).join(artifact.id.key());
        // `join` keeps an absolute path.
        let here = self.moved(&file.path);
        let here = here.unwrap_or_else(|| self.root.join(&file.path));
        let mut likely = [here, file.path.clone(), loaded].into_iter();
        likely
            .find(is_same)
            .or_else(|| self.all_like(&file.path).into_iter().find(is_same))
    }

    /// Returns all files of the image directory with the name of `path`.
    fn all_like(&self, path: &Path) -> Vec<PathBuf> {
        let Some(name) = path.file_name() else {
            return Vec::new();
        };
        let dirs = KINDS
            .iter()
            .flat_map(|kind| fs::read_dir(self.root.join(kind)));
        let keys = dirs.flatten().flatten().map(|entry| entry.path());
        keys.map(|key| key.join(name))
            .filter(|path| path.is_file())
            .collect()
    }

    fn name_of(&self, path: &Path) -> Option<PathBuf> {
        if let Ok(name) = path.strip_prefix(&self.root) {
            return Some(name.to_owned());
        }
        // Two spellings of the same directory.
        let dir = self.root.canonicalize().ok()?;
        let path = path.canonicalize().ok()?;
        path.strip_prefix(dir).ok().map(Path::to_owned)
    }

    /// Returns the path in this directory of a file that was in another image directory.
    fn moved(&self, path: &Path) -> Option<PathBuf> {
        let mut names = path.components().rev();
        let (file, key, kind) = (names.next()?, names.next()?, names.next()?);
        let Component::Normal(kind) = kind else {
            return None;
        };
        let moved = self.root.join(kind).join(key).join(file);
        (KINDS.iter().any(|known| kind == *known) && moved.exists()).then_some(moved)
    }
}

fn files(manifest: &mut Manifest) -> [(Kind, &mut ImageFile); 3] {
    [
        (Kind::Kernel, &mut manifest.kernel),
        (Kind::Initrd, &mut manifest.initrd),
        (Kind::Rootfs, &mut manifest.base_disk),
    ]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
pub(super) mod tests;
