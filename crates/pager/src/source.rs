//! Sources of the content of guest memory.

use std::{error::Error, io, path::PathBuf};

/// Range of memory of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// True if the range is all zeros; it then need not be read.
    pub zero: bool,
    /// Length, in bytes: at least one page, a multiple of 4096.
    pub len: u64,
}

/// Reason why content is not available. Fatal for the VM that waits for the content.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// A file of the snapshot cannot be read, or ends too early.
    #[error("failed to read {len} bytes at offset {offset} of {}", file.display())]
    Read {
        /// Path of the file.
        file: PathBuf,
        /// Offset in the file, in bytes.
        offset: u64,
        /// Requested length, in bytes.
        len: u64,
        /// Error returned by the kernel.
        source: io::Error,
    },
    /// The requested range lies outside of the snapshot's memory.
    #[error("{len} bytes at offset {offset} are outside of the {size} bytes of guest memory")]
    OutOfRange {
        /// Offset in guest memory, in bytes.
        offset: u64,
        /// Requested length, in bytes.
        len: u64,
        /// Size of the memory, in bytes.
        size: u64,
    },
    /// Any other error of the implementation.
    #[error("failed to read guest memory at offset {offset}")]
    Other {
        /// Offset in guest memory, in bytes.
        offset: u64,
        /// Cause of the failure.
        source: Box<dyn Error + Send + Sync>,
    },
}

/// Content of guest memory, by offset. Two threads read it at once, and an offset always has the
/// same content.
pub trait MemorySource: Send + Sync {
    /// Returns the size of the memory, in bytes; a multiple of 4096.
    fn len(&self) -> u64;

    /// True if the memory has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the kind and length of the extent that begins at `offset` (a multiple of 4096, below
    /// [`MemorySource::len`]).
    ///
    /// # Errors
    /// [`SourceError`]
    fn extent(&self, offset: u64) -> Result<Extent, SourceError>;

    /// Fills `buf` (whole pages) from `offset`, a multiple of 4096. The range may span several
    /// extents.
    ///
    /// # Errors
    /// [`SourceError`]; the content of `buf` is undefined after an error.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError>;
}

/// Memory that was never written.
#[derive(Debug, Clone, Copy)]
pub struct Zeros {
    len: u64,
}

impl Zeros {
    /// Creates a source of `len` zero bytes; `len` is a multiple of 4096.
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
    fn zero_run_ends_at_the_first_nonzero_page() {
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
