//! The place of many snapshots.
//!
//! ```text
//! <root>/                       0700
//!   memory/<build>.mem          pages of a generation; never changed
//!   disks/<build>.qcow2         a frozen layer of a disk; never changed
//!   snapshots/<build>/          header, device, manifest.json, working-set
//!   staging/<build>/            a snapshot in the making
//!   lock                        shared: something is published; exclusive: something is collected
//! ```
//!
//! A snapshot is there when its directory below `snapshots` is: everything it stands on was flushed and put into its place
//! before. Whatever a crash leaves is garbage, and removed by [`Store::collect`].

mod collect;
mod staging;

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

pub use staging::Staging;

use crate::{BuildId, Header, HeaderError, Manifest, ManifestError, layout};

const DIRS: [&str; 4] = ["memory", "disks", "snapshots", "staging"];

/// Why the store could not do as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no such snapshot.
    #[error("there is no snapshot {0}")]
    NotFound(BuildId),
    /// A manifest is damaged.
    #[error("{path} is damaged")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// How.
        #[source]
        source: ManifestError,
    },
    /// A header is damaged.
    #[error("{path} is damaged")]
    Header {
        /// The file.
        path: PathBuf,
        /// Where and how.
        #[source]
        source: HeaderError,
    },
    /// A file is not what was written.
    #[error("{0} is damaged: its checksum does not fit")]
    Checksum(PathBuf),
    /// A layer of the disk is not there.
    #[error("the disk layer {0} is missing")]
    MissingLayer(PathBuf),
    /// The file system refused.
    #[error("could not {step} {path}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Its failure.
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

/// Name of the file with a generation's pages.
#[must_use]
pub fn diff_name(build: BuildId) -> String {
    format!("{build}.mem")
}

/// Name of the file of a disk's layer.
#[must_use]
pub fn layer_name(build: BuildId) -> String {
    format!("{build}.qcow2")
}

/// A directory of snapshots.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// A snapshot of a store.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Its directory.
    pub dir: PathBuf,
    /// What it is of.
    pub manifest: Manifest,
}

impl Snapshot {
    /// The header of its memory.
    ///
    /// # Errors
    /// If it is missing or damaged.
    pub fn header(&self) -> Result<Header, StoreError> {
        read_header(&self.dir)
    }

    /// Compares the state of its devices with its checksum.
    ///
    /// # Errors
    /// Names the file if it is missing or damaged.
    pub fn verify_devices(&self) -> Result<(), StoreError> {
        let path = self.dir.join(layout::DEVICE);
        let found = checksum(&path)?;
        match self.manifest.device_checksum {
            Some(written) if written != found => Err(StoreError::Checksum(path)),
            _ => Ok(()),
        }
    }
}

impl Store {
    /// Opens a store, and makes its directories if they are not there.
    ///
    /// # Errors
    /// If they cannot be made.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        for dir in DIRS {
            let path = root.join(dir);
            fs::DirBuilder::new()
                .mode(0o700)
                .recursive(true)
                .create(&path)
                .map_err(failed("make", &path))?;
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// A store that is only read; nothing need be there.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Where diff files are.
    #[must_use]
    pub fn memory_dir(&self) -> PathBuf {
        self.root.join("memory")
    }

    /// The file of a disk's layer.
    #[must_use]
    pub fn layer(&self, build: BuildId) -> PathBuf {
        self.root.join("disks").join(layer_name(build))
    }

    fn snapshot_dir(&self, build: BuildId) -> PathBuf {
        self.root.join("snapshots").join(build.to_string())
    }

    /// A snapshot, whose disk layers are known to be there.
    ///
    /// # Errors
    /// If there is none, or its manifest is damaged.
    pub fn snapshot(&self, build: BuildId) -> Result<Snapshot, StoreError> {
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

    /// Whether a snapshot is one of this store.
    #[must_use]
    pub fn holds(&self, snapshot: &Snapshot) -> bool {
        snapshot.dir.starts_with(&self.root)
    }

    /// The header of a snapshot's memory.
    ///
    /// # Errors
    /// If it is missing or damaged.
    pub fn header(&self, build: BuildId) -> Result<Header, StoreError> {
        read_header(&self.snapshot_dir(build))
    }

    /// All snapshots.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn list(&self) -> Result<Vec<BuildId>, StoreError> {
        names(&self.root.join("snapshots"), "")
    }

    /// What a snapshot alone takes on the disk, bytes: its own generation of memory, its own layer, its own directory.
    ///
    /// # Errors
    /// If it is not there.
    pub fn size(&self, build: BuildId) -> Result<u64, StoreError> {
        let snapshot = self.snapshot(build)?;
        let own = [
            snapshot.dir.join(layout::HEADER),
            snapshot.dir.join(layout::DEVICE),
            self.memory_dir().join(diff_name(build)),
        ];
        let layer = snapshot.manifest.disk_layers.last();
        let layer = layer.map(|layer| self.layer(*layer));
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

/// XXH3-64 of a small file.
fn checksum(path: &Path) -> Result<u64, StoreError> {
    let bytes = fs::read(path).map_err(failed("read", path))?;
    Ok(xxhash_rust::xxh3::xxh3_64(&bytes))
}

/// What a file takes on the disk, bytes; holes take nothing, nor does a file that is not there.
#[must_use]
pub fn on_disk(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}

/// Build ids of the files in a directory that end in `suffix`.
fn names(dir: &Path, suffix: &str) -> Result<Vec<BuildId>, StoreError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed("list", dir))? {
        let name = entry.map_err(failed("list", dir))?.file_name();
        let id = name.to_str().and_then(|name| name.strip_suffix(suffix));
        found.extend(id.and_then(|id| id.parse::<BuildId>().ok()));
    }
    Ok(found)
}

/// Flushes a directory: what was renamed into it stays.
fn sync_dir(path: &Path) -> Result<(), StoreError> {
    let dir = fs::File::open(path).map_err(failed("open", path))?;
    dir.sync_all().map_err(failed("flush", path))
}
