//! Artifacts as files: `<root>/<kind>/<key>`.

use std::{
    fs::{self, File},
    io::{self, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use crate::{Artifact, ArtifactId, ArtifactStore, Kind, ReadAt, StoreError, content::CHUNK_BYTES};

/// Mode of a stored file. Nothing writes to it.
const READ_ONLY: u32 = 0o444;

/// Store in a directory.
#[derive(Debug, Clone)]
pub struct LocalStore {
    root: PathBuf,
}

impl LocalStore {
    /// Opens a store, and creates its directory if it does not exist.
    ///
    /// # Errors
    /// A directory cannot be created.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        for kind in Kind::ALL {
            let path = root.join(kind.name());
            let mut dir = fs::DirBuilder::new();
            dir.mode(0o700).recursive(true);
            dir.create(&path).map_err(StoreError::io("create", &path))?;
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Returns the path of an artifact, whether it exists or not.
    #[must_use]
    pub fn path(&self, id: &ArtifactId) -> PathBuf {
        self.root.join(id.kind().name()).join(id.key())
    }
}

impl ArtifactStore for LocalStore {
    fn open(&self, artifact: &Artifact) -> Result<Box<dyn ReadAt>, StoreError> {
        let path = self.path(&artifact.id);
        match File::open(&path) {
            Ok(file) => Ok(Box::new(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(StoreError::NotFound(artifact.id.clone()))
            }
            Err(error) => Err(StoreError::io("open", &path)(error)),
        }
    }

    fn put(&self, artifact: &Artifact, content: &dyn ReadAt) -> Result<(), StoreError> {
        let path = self.path(&artifact.id);
        if path.exists() {
            return Ok(());
        }
        // No key begins with a dot. Two writers of one artifact have different files.
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!(".{}.{}.{number}", artifact.id.key(), std::process::id());
        let temporary = path.with_file_name(name);
        let written = write_file(&temporary, artifact, content).and_then(|()| {
            wrenn_durable::rename(&temporary, &path).map_err(StoreError::io("publish", &path))
        });
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    fn contains(&self, id: &ArtifactId) -> Result<bool, StoreError> {
        let path = self.path(id);
        path.try_exists().map_err(StoreError::io("find", &path))
    }

    fn remove(&self, id: &ArtifactId) -> Result<bool, StoreError> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(StoreError::io("remove", &path)(error)),
        }
    }

    fn list(&self, kind: Kind) -> Result<Vec<ArtifactId>, StoreError> {
        let dir = self.root.join(kind.name());
        let mut ids = Vec::new();
        for entry in fs::read_dir(&dir).map_err(StoreError::io("list", &dir))? {
            let name = entry.map_err(StoreError::io("list", &dir))?.file_name();
            let id = name.to_str().map(|key| ArtifactId::new(kind, key));
            ids.extend(id.and_then(Result::ok));
        }
        Ok(ids)
    }
}

/// Number of the next temporary file of this process.
static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

/// Writes the content of an artifact to a new file, verifies each chunk, and flushes the file. Chunks
/// of zeros become holes. The file is read-only.
///
/// # Errors
/// `Damaged`, or the content cannot be read, or the file cannot be written. The file may exist then.
pub fn write_file(
    path: &Path,
    artifact: &Artifact,
    content: &dyn ReadAt,
) -> Result<(), StoreError> {
    let failed = |step| StoreError::io(step, path);
    let mut file = fs::OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(READ_ONLY)
        .open(path)
        .map_err(failed("create"))?;
    file.set_len(artifact.content.len())
        .map_err(failed("write"))?;
    let mut part = Vec::new();
    for chunk in 0..artifact.content.chunks() {
        part.resize(artifact.content.chunk_len(chunk), 0);
        read_chunk(artifact, content, chunk, &mut part)?;
        if artifact.content.is_zero(chunk) {
            continue;
        }
        let written = file
            .seek(SeekFrom::Start(chunk * CHUNK_BYTES))
            .and_then(|_| file.write_all(&part));
        written.map_err(failed("write"))?;
    }
    file.sync_all().map_err(failed("flush"))
}

/// Reads a chunk of a source and verifies it.
pub(crate) fn read_chunk(
    artifact: &Artifact,
    content: &dyn ReadAt,
    chunk: u64,
    part: &mut [u8],
) -> Result<(), StoreError> {
    let id = || artifact.id.clone();
    let read = content.read_at(chunk * CHUNK_BYTES, part);
    read.map_err(|source| StoreError::Read { id: id(), source })?;
    match artifact.content.matches(chunk, part) {
        true => Ok(()),
        false => Err(StoreError::Damaged { id: id(), chunk }),
    }
}
