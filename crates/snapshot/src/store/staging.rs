//! Staged snapshots, which are not published yet.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::fs::FlockOperation;

use super::{NewLayer, Store, StoreError, diff_name, failed, sync_dir};
use crate::{Header, Manifest, SnapshotId, layout};

/// Directory to which a snapshot is written. On drop, the directory is removed with its content,
/// unless the snapshot was published.
#[derive(Debug)]
pub struct Staging {
    pub(super) store: Store,
    build: SnapshotId,
    pub(super) dir: PathBuf,
}

impl Store {
    /// Stages a new snapshot.
    ///
    /// # Errors
    /// Fails if the directory of the snapshot cannot be created.
    pub fn stage(&self, build: SnapshotId) -> Result<Staging, StoreError> {
        let dir = self.root.join("staging").join(build.to_string());
        fs::create_dir(&dir).map_err(failed("create", &dir))?;
        Ok(Staging {
            store: self.clone(),
            build,
            dir,
        })
    }
}

impl Staging {
    /// Returns the directory to which the snapshot is written.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Returns the id of the snapshot.
    #[must_use]
    pub const fn build(&self) -> SnapshotId {
        self.build
    }

    /// Reads the header that was written to the directory.
    ///
    /// # Errors
    /// Fails if the header is missing or damaged.
    pub fn header(&self) -> Result<Header, StoreError> {
        super::read_header(&self.dir)
    }

    /// Publishes the snapshot.
    ///
    /// `layers` are disk layers that are not in the store yet. They are linked or copied, and also
    /// stay at their present paths. Diff files of earlier generations are linked in the same way
    /// from `other`, if `other` has them.
    ///
    /// # Errors
    /// Fails if a file that the snapshot depends on is missing, or the disk is full. The snapshot
    /// does not exist in this case.
    pub fn publish(
        self,
        manifest: &Manifest,
        layers: &[NewLayer],
        other: Option<&Store>,
    ) -> Result<(), StoreError> {
        // While the lock is held, nothing is collected. The linked files therefore remain until the
        // snapshot that needs them exists.
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
        for layer in layers {
            flush(&layer.path)?;
            self.take_layer(layer)?;
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
        wrenn_durable::rename(&self.dir.join(layout::MEMORY), &target)
            .map_err(failed("publish", &target))?;
        sync_dir(&self.dir)?;
        let target = self.store.snapshot_dir(self.build);
        wrenn_durable::rename(&self.dir, &target).map_err(failed("publish", &target))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.dir.display(), %error, "failed to remove a staged snapshot");
            }
            _ => {}
        }
    }
}

impl Staging {
    /// Ensures that a diff file of an earlier generation is in this store, and links it from
    /// `other` if `other` has it.
    fn take_diff(&self, build: SnapshotId, other: Option<&Store>) -> Result<(), StoreError> {
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

    /// Links `source` to `target`. An existing target is not an error. Across file systems, the
    /// file is first copied to the staging directory, where no other process writes, and then
    /// renamed.
    pub(super) fn link_or_copy(&self, source: &Path, target: &Path) -> Result<(), StoreError> {
        match fs::hard_link(source, target) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::CrossesDevices => {
                let copy = self.dir.join("copy");
                let copied = fs::copy(source, &copy)
                    .and_then(|_| fs::File::open(&copy)?.sync_all())
                    .and_then(|()| wrenn_durable::rename(&copy, target));
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
