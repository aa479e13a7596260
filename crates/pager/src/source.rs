//! Where the content of guest memory comes from.

use std::{error::Error, io, path::PathBuf};

/// A range of memory of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Whether it is all zeros; it need not be read then.
    pub zero: bool,
    /// Length, bytes: at least one page, a multiple of 4096.
    pub len: u64,
}

/// Why content cannot be had. Fatal for the machine that waits for it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// A file of the snapshot cannot be read, or ends too early.
    #[error("cannot read {len} bytes at {offset} of {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Bytes from its start.
        offset: u64,
        /// Bytes wanted.
        len: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody asks for memory that the snapshot does not have.
    #[error("{len} bytes at {offset} are outside of the {size} bytes of memory")]
    OutOfRange {
        /// Offset in guest memory, bytes.
        offset: u64,
        /// Bytes wanted.
        len: u64,
        /// Size of the memory, bytes.
        size: u64,
    },
    /// Anything else that the implementation has to say.
    #[error("no content for offset {offset}")]
    Other {
        /// Offset in guest memory, bytes.
        offset: u64,
        /// The reason.
        source: Box<dyn Error + Send + Sync>,
    },
}

/// Content of guest memory, by offset. Read by two threads at once; the same offset always has the same content.
pub trait MemorySource: Send + Sync {
    /// Size of the memory, bytes; a multiple of 4096.
    fn len(&self) -> u64;

    /// Whether there is no memory at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What begins at `offset` (a multiple of 4096, below [`MemorySource::len`]) and how far it goes.
    ///
    /// # Errors
    /// [`SourceError`]
    fn extent(&self, offset: u64) -> Result<Extent, SourceError>;

    /// Fills `buf` (whole pages) from `offset`, a multiple of 4096. It may reach over several extents.
    ///
    /// # Errors
    /// [`SourceError`]; the content of `buf` is then undefined.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError>;
}

/// Memory that was never written.
#[derive(Debug, Clone, Copy)]
pub struct Zeros {
    len: u64,
}

impl Zeros {
    /// `len` bytes of zeros; a multiple of 4096.
    #[must_use]
    pub fn new(len: u64) -> Self {
        Self { len }
    }

    fn check(self, offset: u64, len: u64) -> Result<(), SourceError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(SourceError::OutOfRange {
                offset,
                len,
                size: self.len,
            }),
        }
    }
}

impl MemorySource for Zeros {
    fn len(&self) -> u64 {
        self.len
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        self.check(offset, crate::PAGE_BYTES)?;
        Ok(Extent {
            zero: true,
            len: self.len - offset,
        })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        self.check(offset, buf.len() as u64)?;
        buf.fill(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_end_where_they_end() {
        let zeros = Zeros::new(8192);
        let extent = zeros.extent(4096).expect("inside");
        assert_eq!((extent.zero, extent.len), (true, 4096));
        assert!(zeros.extent(8192).is_err());
        assert!(zeros.extent(u64::MAX).is_err());
        let mut page = [1; 4096];
        zeros.read_at(4096, &mut page).expect("inside");
        assert_eq!(page, [0; 4096]);
        assert!(zeros.read_at(8192, &mut page).is_err());
    }
}
