//! Reading memory through its generations.

use std::{
    fs, io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use xxhash_rust::xxh3::Xxh3;

use crate::{BuildId, Header, Mapping, Source, mapping::lookup, store::diff_name};

/// How much is read at once to check a file, bytes.
const VERIFY_BYTES: usize = 1024 * 1024;

/// Why memory cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// A diff file is not there.
    #[error("the memory file {} is missing", diff_name(*build))]
    Missing {
        /// Its name.
        build: BuildId,
    },
    /// A diff file has another length than its header says.
    #[error("{path} has {got} bytes instead of {want}: it is damaged")]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        got: u64,
        /// What the header says.
        want: u64,
    },
    /// A diff file has another content than was written.
    #[error("{path} is damaged: its checksum does not fit")]
    Checksum {
        /// The file.
        path: PathBuf,
    },
    /// A diff file cannot be read.
    #[error("could not read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Its failure.
        #[source]
        source: io::Error,
    },
    /// There is no such memory.
    #[error("there is no memory at offset {0}")]
    OutOfRange(u64),
}

/// An open diff file.
#[derive(Debug)]
pub struct Diff {
    path: PathBuf,
    file: fs::File,
    len: u64,
    checksum: u64,
}

/// The memory of one moment, open for reading. May be read by many threads at once.
///
/// Its files stay readable when they are removed.
#[derive(Debug)]
pub struct Chain {
    diffs: Vec<Diff>,
    mappings: Vec<Mapping>,
}

impl Chain {
    /// Opens all files that a header names; they are searched in `dirs`, in this order.
    ///
    /// # Errors
    /// Names the file that is missing or has the wrong length.
    pub fn open(dirs: &[PathBuf], header: &Header) -> Result<Self, ChainError> {
        let open = |diff: &crate::DiffFile| {
            let (path, file) = find(dirs, diff.build)?;
            let got = file
                .metadata()
                .map_err(|source| ChainError::Read {
                    path: path.clone(),
                    source,
                })?
                .len();
            if got != diff.len {
                return Err(ChainError::Length {
                    path,
                    got,
                    want: diff.len,
                });
            }
            Ok(Diff {
                path,
                file,
                len: diff.len,
                checksum: diff.checksum,
            })
        };
        Ok(Self {
            diffs: header.diffs().iter().map(open).collect::<Result<_, _>>()?,
            mappings: header.mappings().to_vec(),
        })
    }

    /// Whether zeros begin at `offset`, and for how many bytes it goes on like that.
    ///
    /// # Errors
    /// `OutOfRange`
    pub fn extent(&self, offset: u64) -> Result<(bool, u64), ChainError> {
        let (source, len) = lookup(&self.mappings, offset).ok_or(ChainError::OutOfRange(offset))?;
        Ok((source == Source::Zero, len))
    }

    /// Fills `buffer` with what is at `offset`, over as many pieces as it takes.
    ///
    /// # Errors
    /// Names the file that could not be read, or ended too early.
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
                    diff.file
                        .read_exact_at(piece, offset)
                        .map_err(|source| diff.unread(source))?;
                }
            }
            at += len as u64;
            rest = behind;
        }
        Ok(())
    }

    /// The files that it is in.
    #[must_use]
    pub fn files(&self) -> &[Diff] {
        &self.diffs
    }

    /// Reads every file to its end and compares checksums. Takes as long as the files are.
    ///
    /// # Errors
    /// Names the file that is damaged.
    pub fn verify(&self) -> Result<(), ChainError> {
        self.diffs.iter().try_for_each(Diff::verify)
    }
}

impl Diff {
    /// What the file system says of it.
    ///
    /// # Errors
    /// `Read`
    pub fn metadata(&self) -> Result<fs::Metadata, ChainError> {
        self.file.metadata().map_err(|source| self.unread(source))
    }

    /// Reads it to its end and compares the checksum.
    ///
    /// # Errors
    /// `Read`, `Checksum`
    pub fn verify(&self) -> Result<(), ChainError> {
        let mut buffer = vec![0; VERIFY_BYTES];
        let mut hash = Xxh3::new();
        let mut at = 0;
        while at < self.len {
            let len = usize::try_from(self.len - at)
                .unwrap_or(usize::MAX)
                .min(VERIFY_BYTES);
            self.file
                .read_exact_at(&mut buffer[..len], at)
                .map_err(|source| self.unread(source))?;
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

    fn unread(&self, source: io::Error) -> ChainError {
        ChainError::Read {
            path: self.path.clone(),
            source,
        }
    }
}

fn find(dirs: &[PathBuf], build: BuildId) -> Result<(PathBuf, fs::File), ChainError> {
    for dir in dirs {
        let path = Path::join(dir, diff_name(build));
        match fs::File::open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(ChainError::Read { path, source }),
        }
    }
    Err(ChainError::Missing { build })
}
