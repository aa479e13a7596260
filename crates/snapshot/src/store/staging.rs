//! Staged snapshots, which are not published yet.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::fs::FlockOperation;
use wrenn_store::{Artifact, ArtifactId, Kind};

use super::{NewLayer, Store, StoreError, artifact_of, diff_name, failed, sync_dir};
use crate::{Header, Layer, Manifest, SnapshotId, layout};

/// Directory to which a snapshot is written. On drop, the directory is removed with its content,
/// unless the snapshot was published.
#[derive(Debug)]
pub struct Staging {
    pub(super) store: Store,
    build: SnapshotId,
    pub(super) dir: PathBuf,
}

/// Files of earlier snapshots that a new snapshot depends on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Earlier<'a> {
    /// Length and checksums of files. Others are read.
    pub known: &'a [Artifact],
    /// Store whose diff files are linked.
    pub other: Option<&'a Store>,
    /// True if known diff files that are in no store are in an object store.
    pub is_remote: bool,
}

impl Earlier<'_> {
    fn find(&self, id: &ArtifactId) -> Option<&Artifact> {
        self.known.iter().find(|known| known.id == *id)
    }
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
    /// stay at their present paths. Diff files of earlier generations are taken as `earlier` says.
    /// The parts of the manifest that describe the content of the files are filled in.
    ///
    /// # Errors
    /// Fails if a file that the snapshot depends on is missing, or the disk is full. The snapshot
    /// does not exist in this case.
    pub fn publish(
        self,
        manifest: &Manifest,
        layers: &[NewLayer],
        earlier: &Earlier<'_>,
    ) -> Result<(), StoreError> {
        // While the lock is held, nothing is collected. The linked files therefore remain until the
        // snapshot that needs them exists.
        let _lock = self.store.lock(FlockOperation::LockShared)?;
        for name in [layout::DEVICE, layout::HEADER, layout::MEMORY] {
            flush(&self.dir.join(name))?;
        }
        let header = self.header()?;
        for diff in header.diffs() {
            if diff.build != self.build {
                self.take_diff(diff.build, earlier)?;
            }
        }
        for layer in layers {
            flush(&layer.path)?;
            self.take_layer(layer)?;
        }
        for build in manifest.layers() {
            let layer = self.store.layer(build);
            if !layer.exists() {
                return Err(StoreError::MissingLayer(layer));
            }
        }
        sync_dir(&self.store.root.join("disks"))?;
        self.write_manifest(manifest, &header, earlier)?;
        let memory = self.store.memory_dir();
        let target = memory.join(diff_name(self.build));
        wrenn_durable::rename(&self.dir.join(layout::MEMORY), &target)
            .map_err(failed("publish", &target))?;
        self.appear()
    }
}

impl Staging {
    /// Publishes a snapshot that was made elsewhere. Its header and device state are in the
    /// directory, its memory diffs need not be in this store. `layers` are disk layers in the
    /// directory that are not in the store yet.
    ///
    /// # Errors
    /// A layer is missing, or the disk is full. The snapshot does not exist in this case.
    pub fn publish_loaded(
        self,
        manifest: &Manifest,
        layers: Vec<(SnapshotId, PathBuf)>,
    ) -> Result<(), StoreError> {
        let _lock = self.store.lock(FlockOperation::LockShared)?;
        let path = self.dir.join(layout::MANIFEST);
        let text = serde_json::to_vec_pretty(manifest).map_err(std::io::Error::from);
        text.and_then(|text| fs::write(&path, text))
            .map_err(failed("write", &path))?;
        for name in [layout::HEADER, layout::DEVICE, layout::MANIFEST] {
            flush(&self.dir.join(name))?;
        }
        for (build, path) in layers {
            let target = self.store.layer(build);
            wrenn_durable::rename(&path, &target).map_err(failed("publish", &target))?;
        }
        for build in manifest.layers() {
            let layer = self.store.layer(build);
            if !layer.exists() {
                return Err(StoreError::MissingLayer(layer));
            }
        }
        sync_dir(&self.store.root.join("disks"))?;
        self.appear()
    }

    /// Moves the directory to its final place.
    fn appear(&self) -> Result<(), StoreError> {
        sync_dir(&self.dir)?;
        let target = self.store.snapshot_dir(self.build);
        wrenn_durable::rename(&self.dir, &target).map_err(failed("publish", &target))
    }

    /// Writes the manifest with the content of all files.
    fn write_manifest(
        &self,
        manifest: &Manifest,
        header: &Header,
        earlier: &Earlier<'_>,
    ) -> Result<(), StoreError> {
        let describe = |id: ArtifactId, path: &Path| match earlier.find(&id) {
            Some(known) => Ok(known.clone()),
            None => artifact_of(id, path),
        };
        let own = |kind, name: &str| artifact_of(self.build.artifact(kind), &self.dir.join(name));
        let mut memory = Vec::new();
        for diff in header.diffs() {
            memory.push(match diff.build == self.build {
                true => own(Kind::Memory, layout::MEMORY)?,
                false => describe(
                    diff.build.artifact(Kind::Memory),
                    &self.store.diff(diff.build),
                )?,
            });
        }
        let mut disk_layers = Vec::new();
        for build in manifest.layers() {
            let artifact = describe(build.artifact(Kind::Disk), &self.store.layer(build))?;
            let content = Some(artifact.content);
            disk_layers.push(Layer { build, content });
        }
        let manifest = Manifest {
            version: Manifest::VERSION,
            disk_layers,
            memory,
            header: Some(own(Kind::Header, layout::HEADER)?),
            device: Some(own(Kind::Device, layout::DEVICE)?),
            device_checksum: None,
            ..manifest.clone()
        };
        let path = self.dir.join(layout::MANIFEST);
        let text = serde_json::to_vec_pretty(&manifest).map_err(std::io::Error::from);
        text.and_then(|text| fs::write(&path, text))
            .map_err(failed("write", &path))?;
        flush(&path)
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
    /// Ensures that a diff file of an earlier generation is in this store or in the object store.
    fn take_diff(&self, build: SnapshotId, earlier: &Earlier<'_>) -> Result<(), StoreError> {
        let target = self.store.memory_dir().join(diff_name(build));
        if let Some(other) = earlier.other {
            let source = other.memory_dir().join(diff_name(build));
            if source.exists() {
                return self.link_or_copy(&source, &target);
            }
        }
        let id = build.artifact(Kind::Memory);
        match fs::metadata(&target) {
            Err(_) if earlier.is_remote && earlier.find(&id).is_some() => Ok(()),
            found => found.map(drop).map_err(failed("find", &target)),
        }
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
