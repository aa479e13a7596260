//! Reader of guest memory that is stored in several generations of diff files.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use wrenn_store::{Kind, ReadAt};
use xxhash_rust::xxh3::Xxh3;

use crate::{Header, Mapping, SnapshotId, Source, mapping::lookup, store::diff_name};

/// Size of one read while a file is verified, in bytes.
const VERIFY_BYTES: usize = 1024 * 1024;

/// Reason why memory cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// A diff file does not exist.
    #[error("memory diff file {} is missing", diff_name(*build))]
    Missing {
        /// Snapshot id that names the file.
        build: SnapshotId,
    },
    /// The length of a diff file differs from the length in the header.
    #[error("{path} is damaged: {got} bytes, expected {want}")]
    Length {
        /// Path of the file.
        path: PathBuf,
        /// Length of the file, in bytes.
        got: u64,
        /// Length according to the header, in bytes.
        want: u64,
    },
    /// The content of a diff file differs from the written content.
    #[error("{path} is damaged: checksum mismatch")]
    Checksum {
        /// Path of the file.
        path: PathBuf,
    },
    /// A diff file cannot be read.
    #[error("failed to read {path}")]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Error returned by the file system.
        #[source]
        source: io::Error,
    },
    /// The offset lies beyond the end of memory.
    #[error("offset {0} is outside of the snapshot's memory")]
    OutOfRange(u64),
}

/// Open diff file.
#[derive(Debug)]
pub struct Diff {
    /// Path of the file, or id of a remote one.
    path: PathBuf,
    place: Place,
    len: u64,
    checksum: u64,
}

/// Place of a diff file.
#[derive(Debug)]
enum Place {
    Local(fs::File),
    /// Content that verifies itself when it is read.
    Remote(Box<dyn ReadAt>),
}

/// Opens a diff file that is in no directory. Returns `None` if it is nowhere else either.
pub type OpenRemote<'a> = dyn Fn(SnapshotId) -> io::Result<Option<Box<dyn ReadAt>>> + 'a;

/// Memory of one snapshot, open for reading. Several threads may read it at once.
///
/// The files stay readable after they are removed from the directory.
#[derive(Debug)]
pub struct Chain {
    diffs: Vec<Diff>,
    mappings: Vec<Mapping>,
}

impl Chain {
    /// Opens all diff files that a header references. They are searched in `dirs`, in this order.
    ///
    /// # Errors
    /// The error names the file that is missing or has the wrong length.
    pub fn open(dirs: &[PathBuf], header: &Header) -> Result<Self, ChainError> {
        Self::open_with(dirs, header, &|_| Ok(None))
    }

    /// Same as [`open`](Self::open). `remote` opens the files that are in none of the directories.
    ///
    /// # Errors
    /// The error names the file that is missing or has the wrong length.
    pub fn open_with(
        dirs: &[PathBuf],
        header: &Header,
        remote: &OpenRemote<'_>,
    ) -> Result<Self, ChainError> {
        let open = |diff: &crate::DiffFile| {
            let (path, place) = find(dirs, diff.build, remote)?;
            let len = match &place {
                Place::Local(file) => ReadAt::len(file),
                Place::Remote(content) => content.len(),
            };
            let got = len.map_err(|source| ChainError::Read {
                path: path.clone(),
                source,
            })?;
            if got != diff.len {
                return Err(ChainError::Length {
                    path,
                    got,
                    want: diff.len,
                });
            }
            Ok(Diff {
                path,
                place,
                len: diff.len,
                checksum: diff.checksum,
            })
        };
        Ok(Self {
            diffs: header.diffs().iter().map(open).collect::<Result<_, _>>()?,
            mappings: header.mappings().to_vec(),
        })
    }

    /// Returns the kind of the extent at `offset` (true for zeros) and its remaining length, in
    /// bytes.
    ///
    /// # Errors
    /// `OutOfRange`
    pub fn extent(&self, offset: u64) -> Result<(bool, u64), ChainError> {
        let (source, len) = lookup(&self.mappings, offset).ok_or(ChainError::OutOfRange(offset))?;
        Ok((source == Source::Zero, len))
    }

    /// Fills `buffer` with the content at `offset`, from as many mappings as needed.
    ///
    /// # Errors
    /// The error names the file that cannot be read or ends too early.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ChainError> {
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let (source, len) = lookup(&self.mappings, at).ok_or(ChainError::OutOfRange(at))?;
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(rest.len());
            let (piece, behind) = rest.split_at_mut(len);
            match source {
                Source::Zero => piece.fill(0),
                Source::Diff { file, offset } => {
                    let diff = self
                        .diffs
                        .get(file as usize)
                        .ok_or(ChainError::OutOfRange(at))?;
                    diff.read_at(offset, piece)?;
                }
            }
            at += len as u64;
            rest = behind;
        }
        Ok(())
    }

    /// Returns the diff files of the memory.
    #[must_use]
    pub fn files(&self) -> &[Diff] {
        &self.diffs
    }

    /// Reads every file to its end and compares its checksum. The duration is proportional to the
    /// size of the files.
    ///
    /// # Errors
    /// The error names the damaged file.
    pub fn verify(&self) -> Result<(), ChainError> {
        self.diffs.iter().try_for_each(Diff::verify)
    }
}

impl Diff {
    /// Returns the file's metadata; `None` for a remote file.
    ///
    /// # Errors
    /// `Read`
    pub fn metadata(&self) -> Result<Option<fs::Metadata>, ChainError> {
        match &self.place {
            Place::Local(file) => file
                .metadata()
                .map(Some)
                .map_err(|source| self.unread(source)),
            Place::Remote(_) => Ok(None),
        }
    }

    /// Reads a local file to its end and compares its checksum. A remote file verifies itself when
    /// it is read.
    ///
    /// # Errors
    /// `Read`, `Checksum`
    pub fn verify(&self) -> Result<(), ChainError> {
        if matches!(self.place, Place::Remote(_)) {
            return Ok(());
        }
        let mut buffer = vec![0; VERIFY_BYTES];
        let mut hash = Xxh3::new();
        let mut at = 0;
        while at < self.len {
            let len = usize::try_from(self.len - at)
                .unwrap_or(usize::MAX)
                .min(VERIFY_BYTES);
            self.read_at(at, &mut buffer[..len])?;
            hash.update(&buffer[..len]);
            at += len as u64;
        }
        if hash.digest() == self.checksum {
            return Ok(());
        }
        Err(ChainError::Checksum {
            path: self.path.clone(),
        })
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ChainError> {
        let read = match &self.place {
            Place::Local(file) => file.read_at(offset, buffer),
            Place::Remote(content) => content.read_at(offset, buffer),
        };
        read.map_err(|source| self.unread(source))
    }

    fn unread(&self, source: io::Error) -> ChainError {
        ChainError::Read {
            path: self.path.clone(),
            source,
        }
    }
}

fn find(
    dirs: &[PathBuf],
    build: SnapshotId,
    remote: &OpenRemote<'_>,
) -> Result<(PathBuf, Place), ChainError> {
    for dir in dirs {
        let path = Path::join(dir, diff_name(build));
        match fs::File::open(&path) {
            Ok(file) => return Ok((path, Place::Local(file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(ChainError::Read { path, source }),
        }
    }
    let path: PathBuf = build.artifact(Kind::Memory).to_string().into();
    match remote(build) {
        Ok(Some(content)) => Ok((path, Place::Remote(content))),
        Ok(None) => Err(ChainError::Missing { build }),
        Err(source) => Err(ChainError::Read { path, source }),
    }
}
