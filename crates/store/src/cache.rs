//! Cache of chunks on the host's disk, shared by all processes of the host.
//!
//! ```text
//! <root>/chunks/<kind>/<key>/<number>   content of one chunk; appears by rename
//! <root>/locks/<number>                 held by the process that loads a chunk
//! <root>/usage                          bytes of all chunks, little-endian; its lock guards it
//! ```
//!
//! A process that needs a chunk loads it under a lock, so that others wait instead of loading it
//! again. A chunk is verified whenever a process opens it: a damaged file is loaded again. The total
//! size is limited; the chunks that were opened least recently are removed first. A process that has
//! opened a chunk can read it after its removal. A process that dies leaves at most a temporary file,
//! which the next removal of old chunks deletes.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rustix::fs::{FlockOperation, flock};

use crate::{Artifact, ReadAt, StoreError};

/// Number of locks. Two chunks with the same lock are not loaded at the same time.
const LOCKS: u64 = 256;

/// Part of the limit that is left after a removal of old chunks: seven eighths.
const KEPT: (u64, u64) = (7, 8);

/// Age after which a temporary file belongs to a process that has died.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Cache in a directory.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
    limit_bytes: u64,
    room_bytes: u64,
}

/// Verified content of a chunk.
#[derive(Debug)]
pub(crate) enum Chunk {
    File(File),
    /// The cache could not be written to: its disk is full, for example.
    Memory(Vec<u8>),
}

impl Chunk {
    pub(crate) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File(file) => file.read_at(offset, buffer),
            Self::Memory(bytes) => bytes.read_at(offset, buffer),
        }
    }
}

impl Cache {
    /// Opens a cache that uses at most `limit_bytes` of the disk, and adds nothing while less than
    /// `room_bytes` of the disk are free.
    ///
    /// # Errors
    /// A directory cannot be created.
    pub fn open(root: &Path, limit_bytes: u64, room_bytes: u64) -> Result<Self, StoreError> {
        for name in ["chunks", "locks"] {
            create_dir(&root.join(name))?;
        }
        Ok(Self {
            root: root.to_owned(),
            limit_bytes,
            room_bytes,
        })
    }

    /// Returns the bytes of all chunks, as last counted.
    ///
    /// # Errors
    /// The counter cannot be read.
    pub fn usage_bytes(&self) -> Result<u64, StoreError> {
        self.usage()?.read()
    }

    /// Returns a chunk. `load` loads its content if the cache does not have it.
    ///
    /// # Errors
    /// The error of `load`; `Damaged` if it returns other content. A cache that cannot be used is no
    /// error: the chunk is loaded and not kept.
    pub(crate) fn chunk(
        &self,
        artifact: &Artifact,
        number: u64,
        load: impl Fn() -> Result<Vec<u8>, StoreError>,
    ) -> Result<Chunk, StoreError> {
        let path = self.path(artifact, number);
        if let Some(file) = open_verified(&path, artifact, number) {
            return Ok(Chunk::File(file));
        }
        // Without the lock, the chunk may be loaded twice.
        let _lock = self.lock(artifact, number).inspect_err(warn).ok();
        if let Some(file) = open_verified(&path, artifact, number) {
            return Ok(Chunk::File(file));
        }
        let bytes = load()?;
        if !artifact.content.matches(number, &bytes) {
            let (id, chunk) = (artifact.id.clone(), number);
            return Err(StoreError::Damaged { id, chunk });
        }
        let added = self.add(&path, &bytes).inspect_err(warn).ok();
        Ok(added.map_or(Chunk::Memory(bytes), Chunk::File))
    }

    fn path(&self, artifact: &Artifact, number: u64) -> PathBuf {
        let dir = self.root.join("chunks").join(artifact.id.kind().name());
        dir.join(artifact.id.key()).join(number.to_string())
    }

    fn lock(&self, artifact: &Artifact, number: u64) -> Result<File, StoreError> {
        let name = format!("{}/{number}", artifact.id);
        let lock = xxhash_rust::xxh3::xxh3_64(name.as_bytes()) % LOCKS;
        locked(&self.root.join("locks").join(lock.to_string()))
    }

    fn add(&self, path: &Path, bytes: &[u8]) -> Result<File, StoreError> {
        if let Some(dir) = path.parent() {
            create_dir(dir)?;
        }
        let stat = rustix::fs::statvfs(&self.root).map_err(io::Error::from);
        let stat = stat.map_err(StoreError::io("inspect", &self.root))?;
        if stat.f_bavail.saturating_mul(stat.f_frsize) < self.room_bytes {
            return Err(StoreError::io("write", path)(
                io::ErrorKind::StorageFull.into(),
            ));
        }
        let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(bytes)?;
            // Not flushed: a file that a power failure damaged is noticed and loaded again.
            fs::rename(&temporary, path)?;
            File::open(path)
        };
        let file = write().inspect_err(|_| drop(fs::remove_file(&temporary)));
        let file = file.map_err(StoreError::io("write", path))?;
        let counted = self.count(bytes.len() as u64);
        counted.inspect_err(warn).ok();
        Ok(file)
    }

    /// Adds to the counter, and removes old chunks if the limit is exceeded.
    fn count(&self, bytes: u64) -> Result<(), StoreError> {
        let mut usage = self.usage()?;
        let total = usage.read()?.saturating_add(bytes);
        match total > self.limit_bytes {
            true => {
                let total = self.remove_old()?;
                usage.write(total)
            }
            false => usage.write(total),
        }
    }

    fn usage(&self) -> Result<Usage, StoreError> {
        let path = self.root.join("usage");
        Ok(Usage {
            file: locked(&path)?,
            path,
        })
    }

    /// Removes the chunks that were opened least recently. Returns the size of all that are left.
    fn remove_old(&self) -> Result<u64, StoreError> {
        let mut files = Vec::new();
        let root = self.root.join("chunks");
        collect_files(&root, &mut files).map_err(StoreError::io("list", &root))?;
        files.sort();
        let mut total: u64 = files.iter().map(|file| file.len).sum();
        let goal = self.limit_bytes / KEPT.1 * KEPT.0;
        for file in &files {
            let is_left =
                file.is_temporary && file.opened.elapsed().is_ok_and(|age| age > ABANDONED);
            if (total <= goal || file.is_temporary) && !is_left {
                continue;
            }
            match fs::remove_file(&file.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(StoreError::io("remove", &file.path)(error));
                }
                _ => total = total.saturating_sub(file.len),
            }
        }
        Ok(total)
    }
}

/// Counter of the bytes of all chunks. Locked.
struct Usage {
    file: File,
    path: PathBuf,
}

impl Usage {
    fn read(&self) -> Result<u64, StoreError> {
        let mut bytes = [0; 8];
        match ReadAt::read_at(&self.file, 0, &mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
            Err(error) => Err(StoreError::io("read", &self.path)(error)),
            Ok(()) => Ok(u64::from_le_bytes(bytes)),
        }
    }

    fn write(&mut self, total: u64) -> Result<(), StoreError> {
        let written = self
            .file
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.file.write_all(&total.to_le_bytes()));
        written.map_err(StoreError::io("write", &self.path))
    }
}

/// File of the cache. The order is that of removal.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct CachedFile {
    opened: SystemTime,
    path: PathBuf,
    len: u64,
    is_temporary: bool,
}

/// Lists all files below a directory. Other processes add and remove files meanwhile.
fn collect_files(dir: &Path, files: &mut Vec<CachedFile>) -> io::Result<()> {
    let is_gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let found = match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => collect_files(&path, files),
            Ok(meta) => meta.modified().map(|opened| {
                files.push(CachedFile {
                    opened,
                    len: meta.len(),
                    is_temporary: path.extension().is_some_and(|name| name == "tmp"),
                    path,
                });
            }),
            Err(error) => Err(error),
        };
        match found {
            Err(error) if !is_gone(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Opens the file of a chunk if it has the right content, and notes the time. A file with other
/// content is removed.
fn open_verified(path: &Path, artifact: &Artifact, number: u64) -> Option<File> {
    let mut file = File::open(path).ok()?;
    let mut bytes = Vec::with_capacity(artifact.content.chunk_len(number));
    let is_read = file.read_to_end(&mut bytes).is_ok();
    if is_read && artifact.content.matches(number, &bytes) {
        // Best effort: without the time, the chunk is removed earlier.
        let _ = file.set_modified(SystemTime::now());
        return Some(file);
    }
    tracing::warn!(path = %path.display(), "damaged chunk removed from the cache");
    let _ = fs::remove_file(path);
    None
}

fn create_dir(path: &Path) -> Result<(), StoreError> {
    let mut dir = fs::DirBuilder::new();
    dir.mode(0o700).recursive(true);
    dir.create(path).map_err(StoreError::io("create", path))
}

/// Opens a file and waits for its lock, which is released when the file is closed.
fn locked(path: &Path) -> Result<File, StoreError> {
    let lock = || {
        let mut options = File::options();
        let file = options
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(path)?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(file)
    };
    lock().map_err(StoreError::io("lock", path))
}

fn warn(error: &StoreError) {
    let cause = std::error::Error::source(error).map(ToString::to_string);
    tracing::warn!(%error, cause, "cache not used");
}
