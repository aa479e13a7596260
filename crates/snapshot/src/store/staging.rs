//! A snapshot in the making.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::fs::FlockOperation;

use super::{Store, StoreError, diff_name, failed, sync_dir};
use crate::{BuildId, Header, Manifest, layout};

/// A directory to write a snapshot to. Gone with all that is in it when it is dropped, unless it was published.
#[derive(Debug)]
pub struct Staging {
    store: Store,
    build: BuildId,
    dir: PathBuf,
}

impl Store {
    /// Begins a snapshot.
    ///
    /// # Errors
    /// If its directory cannot be made.
    pub fn stage(&self, build: BuildId) -> Result<Staging, StoreError> {
        let dir = self.root.join("staging").join(build.to_string());
        fs::create_dir(&dir).map_err(failed("make", &dir))?;
        Ok(Staging {
            store: self.clone(),
            build,
            dir,
        })
    }
}

impl Staging {
    /// Where to write it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Its build id.
    #[must_use]
    pub const fn build(&self) -> BuildId {
        self.build
    }

    /// The header that was written to it.
    ///
    /// # Errors
    /// If it is missing or damaged.
    pub fn header(&self) -> Result<Header, StoreError> {
        super::read_header(&self.dir)
    }

    /// Puts it into its place. `layers` are frozen files of its disk that are not in the store yet, with their names there; they
    /// are linked, and stay where they are. So are diff files of the generations before that `other` has and this store may not.
    ///
    /// # Errors
    /// If a file that it stands on is missing, or the disk is full. Then nothing of it is there.
    pub fn publish(
        self,
        manifest: &Manifest,
        layers: &[(BuildId, PathBuf)],
        other: Option<&Store>,
    ) -> Result<(), StoreError> {
        // From here on nothing is collected, so what is linked stays until the snapshot that needs it is there.
        let _lock = self.store.lock(FlockOperation::LockShared)?;
        let manifest = Manifest {
            device_checksum: Some(super::checksum(&self.dir.join(layout::DEVICE))?),
            ..manifest.clone()
        };
        let path = self.dir.join(layout::MANIFEST);
        let text = serde_json::to_vec_pretty(&manifest).map_err(std::io::Error::from);
        text.and_then(|text| fs::write(&path, text))
            .map_err(failed("write", &path))?;
        for name in [
            layout::HEADER,
            layout::DEVICE,
            layout::MEMORY,
            layout::MANIFEST,
        ] {
            flush(&self.dir.join(name))?;
        }
        for diff in self.header()?.diffs() {
            if diff.build != self.build {
                self.take_diff(diff.build, other)?;
            }
        }
        for (build, source) in layers {
            flush(source)?;
            self.link_or_copy(source, &self.store.layer(*build))?;
        }
        for build in &manifest.disk_layers {
            let layer = self.store.layer(*build);
            if !layer.exists() {
                return Err(StoreError::MissingLayer(layer));
            }
        }
        sync_dir(&self.store.root.join("disks"))?;
        let memory = self.store.memory_dir();
        let target = memory.join(diff_name(self.build));
        fs::rename(self.dir.join(layout::MEMORY), &target).map_err(failed("place", &target))?;
        sync_dir(&memory)?;
        sync_dir(&self.dir)?;
        let target = self.store.snapshot_dir(self.build);
        fs::rename(&self.dir, &target).map_err(failed("place", &target))?;
        sync_dir(&self.store.root.join("snapshots"))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.dir.display(), %error, "a snapshot that was not finished is left");
            }
            _ => {}
        }
    }
}

impl Staging {
    /// Makes sure that a diff file of a generation before is in this store, where `other` may have it.
    fn take_diff(&self, build: BuildId, other: Option<&Store>) -> Result<(), StoreError> {
        let target = self.store.memory_dir().join(diff_name(build));
        if let Some(other) = other {
            let source = other.memory_dir().join(diff_name(build));
            if source.exists() {
                return self.link_or_copy(&source, &target);
            }
        }
        fs::metadata(&target)
            .map(drop)
            .map_err(failed("find", &target))
    }

    /// Fine if it is there already. Another file system cannot be linked to: a copy is made here first, where nobody else writes.
    fn link_or_copy(&self, source: &Path, target: &Path) -> Result<(), StoreError> {
        match fs::hard_link(source, target) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::CrossesDevices => {
                let copy = self.dir.join("copy");
                let copied = fs::copy(source, &copy)
                    .and_then(|_| fs::File::open(&copy)?.sync_all())
                    .and_then(|()| fs::rename(&copy, target));
                copied.map_err(failed("copy", target))
            }
            other => other.map_err(failed("link", target)),
        }
    }
}

fn flush(path: &Path) -> Result<(), StoreError> {
    let file = fs::File::open(path).map_err(failed("open", path))?;
    file.sync_all().map_err(failed("flush", path))
}
