//! Directory that stores many snapshots.
//!
//! ```text
//! <root>/                       0700
//!   memory/<build>.mem          pages of one generation; never changed
//!   disks/<build>.qcow2         read-only layer of a disk; never changed
//!   disks/<build>.sum           checksum of the layer
//!   snapshots/<build>/          header, device, manifest.json, working-set
//!   staging/<build>/            staged snapshot
//!   lock                        shared: publishing; exclusive: garbage collection
//! ```
//!
//! A snapshot exists if its directory in `snapshots` exists. All files that it depends on are
//! flushed and moved into place before. Files left behind by a crash are garbage, and are removed
//! by [`Store::collect`].

mod collect;
mod layer;
mod staging;

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use wrenn_store::{Artifact, ArtifactId, Content, ContentHasher, Kind};

pub use layer::{NewLayer, verify_layer};
pub use staging::{Earlier, Staging};

use crate::{Header, HeaderError, Layer, Manifest, ManifestError, SnapshotId, layout};

const DIRS: [&str; 4] = ["memory", "disks", "snapshots", "staging"];

/// Reason why an operation of the store failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The snapshot does not exist.
    #[error("snapshot {0} does not exist")]
    NotFound(SnapshotId),
    /// A manifest is damaged.
    #[error("manifest {path} is damaged")]
    Manifest {
        /// Path of the file.
        path: PathBuf,
        /// Defect of the manifest.
        #[source]
        source: ManifestError,
    },
    /// A header is damaged.
    #[error("memory header {path} is damaged")]
    Header {
        /// Path of the file.
        path: PathBuf,
        /// Defect of the header, with its position.
        #[source]
        source: HeaderError,
    },
    /// The content of a file differs from the written content.
    #[error("{0} is damaged: checksum mismatch")]
    Checksum(PathBuf),
    /// A disk layer does not exist.
    #[error("disk layer {0} is missing")]
    MissingLayer(PathBuf),
    /// A file system operation failed.
    #[error("failed to {step} {path}")]
    Io {
        /// Attempted operation, as a verb.
        step: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
        /// Error returned by the file system.
        #[source]
        source: io::Error,
    },
}

pub(crate) fn failed<'a>(
    step: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io {
        step,
        path: path.to_owned(),
        source,
    }
}

/// Returns the name of the file with a generation's pages.
#[must_use]
pub fn diff_name(build: SnapshotId) -> String {
    format!("{build}.mem")
}

/// Returns the name of the file of a disk layer.
#[must_use]
pub fn layer_name(build: SnapshotId) -> String {
    format!("{build}.qcow2")
}

/// Store of snapshots in a directory.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// Snapshot in a store.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Directory of the snapshot.
    pub dir: PathBuf,
    /// Manifest of the snapshot.
    pub manifest: Manifest,
}

impl Snapshot {
    /// Reads the header of the snapshot's memory.
    ///
    /// # Errors
    /// Fails if the header is missing or damaged.
    pub fn header(&self) -> Result<Header, StoreError> {
        read_header(&self.dir)
    }

    /// Fills in the content of the files that a manifest of this snapshot does not know. The memory
    /// diffs are looked for in `memory`. `layers` are the paths of the disk layers.
    ///
    /// # Errors
    /// A file is missing or cannot be read.
    pub fn complete(
        &self,
        manifest: Manifest,
        memory: &[PathBuf],
        layers: &[PathBuf],
    ) -> Result<Manifest, StoreError> {
        let build = manifest.build;
        let own = |known: &Option<Artifact>, kind, name| match known {
            Some(known) => Ok(known.clone()),
            None => artifact_of(build.artifact(kind), &self.dir.join(name)),
        };
        let mut all = manifest.memory.clone();
        if all.is_empty() {
            for diff in self.header()?.diffs() {
                let name = diff_name(diff.build);
                let mut paths = memory.iter().map(|dir| dir.join(&name));
                let path = paths.find(|path| path.exists()).unwrap_or_default();
                all.push(artifact_of(diff.build.artifact(Kind::Memory), &path)?);
            }
        }
        let mut disk_layers = Vec::new();
        for (layer, path) in manifest.disk_layers.iter().zip(layers) {
            let content = match &layer.content {
                Some(content) => content.clone(),
                None => artifact_of(layer.build.artifact(Kind::Disk), path)?.content,
            };
            let (build, content) = (layer.build, Some(content));
            disk_layers.push(Layer { build, content });
        }
        Ok(Manifest {
            header: Some(own(&manifest.header, Kind::Header, layout::HEADER)?),
            device: Some(own(&manifest.device, Kind::Device, layout::DEVICE)?),
            memory: all,
            disk_layers,
            ..manifest
        })
    }

    /// Compares the device state with its checksum.
    ///
    /// # Errors
    /// The error names the file if it is missing or damaged.
    pub fn verify_devices(&self) -> Result<(), StoreError> {
        let path = self.dir.join(layout::DEVICE);
        let bytes = fs::read(&path).map_err(failed("read", &path))?;
        let is_damaged = match (&self.manifest.device, self.manifest.device_checksum) {
            (Some(device), _) => content_of(&bytes) != device.content,
            (None, Some(written)) => xxhash_rust::xxh3::xxh3_64(&bytes) != written,
            (None, None) => false,
        };
        match is_damaged {
            true => Err(StoreError::Checksum(path)),
            false => Ok(()),
        }
    }
}

impl Store {
    /// Opens a store and creates its directories if they do not exist.
    ///
    /// # Errors
    /// Fails if a directory cannot be created.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        for dir in DIRS {
            let path = root.join(dir);
            fs::DirBuilder::new()
                .mode(0o700)
                .recursive(true)
                .create(&path)
                .map_err(failed("create", &path))?;
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Returns a read-only view of a store. The directories need not exist.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Returns the directory of the diff files.
    #[must_use]
    pub fn memory_dir(&self) -> PathBuf {
        self.root.join("memory")
    }

    /// Returns the path of a diff file.
    #[must_use]
    pub fn diff(&self, build: SnapshotId) -> PathBuf {
        self.memory_dir().join(diff_name(build))
    }

    /// Returns the path of a disk layer.
    #[must_use]
    pub fn layer(&self, build: SnapshotId) -> PathBuf {
        self.root.join("disks").join(layer_name(build))
    }

    fn snapshot_dir(&self, build: SnapshotId) -> PathBuf {
        self.root.join("snapshots").join(build.to_string())
    }

    /// Reads a snapshot. The disk layers of a published snapshot exist.
    ///
    /// # Errors
    /// Fails if the snapshot does not exist, or its manifest is damaged.
    pub fn snapshot(&self, build: SnapshotId) -> Result<Snapshot, StoreError> {
        let dir = self.snapshot_dir(build);
        let path = dir.join(layout::MANIFEST);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::NotFound(build));
            }
            Err(error) => return Err(failed("read", &path)(error)),
        };
        let manifest =
            Manifest::parse(&bytes).map_err(|source| StoreError::Manifest { path, source })?;
        Ok(Snapshot { dir, manifest })
    }

    /// True if a snapshot is in this store.
    #[must_use]
    pub fn holds(&self, snapshot: &Snapshot) -> bool {
        snapshot.dir.starts_with(&self.root)
    }

    /// Reads the header of a snapshot's memory.
    ///
    /// # Errors
    /// Fails if the header is missing or damaged.
    pub fn header(&self, build: SnapshotId) -> Result<Header, StoreError> {
        read_header(&self.snapshot_dir(build))
    }

    /// Returns the ids of all snapshots.
    ///
    /// # Errors
    /// Fails if the directory cannot be read.
    pub fn list(&self) -> Result<Vec<SnapshotId>, StoreError> {
        names(&self.root.join("snapshots"), "")
    }

    /// Returns the disk space that a snapshot alone uses, in bytes: its own generation of memory,
    /// its own disk layer, and its own directory.
    ///
    /// # Errors
    /// Fails if the snapshot does not exist.
    pub fn size(&self, build: SnapshotId) -> Result<u64, StoreError> {
        let snapshot = self.snapshot(build)?;
        let own = [
            snapshot.dir.join(layout::HEADER),
            snapshot.dir.join(layout::DEVICE),
            self.memory_dir().join(diff_name(build)),
        ];
        let layer = snapshot.manifest.layers().last();
        let layer = layer.map(|layer| self.layer(layer));
        Ok(own.iter().chain(&layer).map(|path| on_disk(path)).sum())
    }

    fn lock(&self, how: FlockOperation) -> Result<fs::File, StoreError> {
        let path = self.root.join("lock");
        let lock = || {
            let file = fs::File::options()
                .create(true)
                .write(true)
                .truncate(false)
                .open(&path)?;
            flock(&file, how)?;
            Ok(file)
        };
        lock().map_err(failed("lock", &path))
    }
}

fn read_header(dir: &Path) -> Result<Header, StoreError> {
    let path = dir.join(layout::HEADER);
    let bytes = fs::read(&path).map_err(failed("read", &path))?;
    Header::parse(&bytes).map_err(|source| StoreError::Header { path, source })
}

/// Returns length and checksums of bytes.
fn content_of(bytes: &[u8]) -> Content {
    let mut hasher = ContentHasher::default();
    hasher.update(bytes);
    hasher.finish()
}

/// Returns the artifact with the content of a file.
fn artifact_of(id: ArtifactId, path: &Path) -> Result<Artifact, StoreError> {
    let file = fs::File::open(path).map_err(failed("open", path))?;
    let content = Content::of(&file).map_err(failed("read", path))?;
    Ok(Artifact { id, content })
}

/// Returns the disk space that a file uses, in bytes. Holes and missing files use none.
#[must_use]
pub fn on_disk(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}

/// Returns the snapshot ids of the files in a directory whose names end in `suffix`.
fn names(dir: &Path, suffix: &str) -> Result<Vec<SnapshotId>, StoreError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed("list", dir))? {
        let name = entry.map_err(failed("list", dir))?.file_name();
        let id = name.to_str().and_then(|name| name.strip_suffix(suffix));
        found.extend(id.and_then(|id| id.parse::<SnapshotId>().ok()));
    }
    Ok(found)
}

/// Flushes a directory, so that renames into it are durable.
fn sync_dir(path: &Path) -> Result<(), StoreError> {
    wrenn_durable::sync_dir(path).map_err(failed("flush", path))
}
