//! Reading of bytes at an offset.

use std::{fs::File, io, os::unix::fs::FileExt as _};

/// Content that several threads may read at once. Reads block.
pub trait ReadAt: Send + Sync + std::fmt::Debug {
    /// Returns the length of the content, in bytes.
    ///
    /// # Errors
    /// The error of the file system.
    fn len(&self) -> io::Result<u64>;

    /// True if there is no content.
    ///
    /// # Errors
    /// The error of the file system.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buffer` with the content at `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` if the content ends before. Other errors name the artifact.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Returns the next range at or behind `offset` that may contain other bytes than zeros, as its
    /// begin and end; `None` if only zeros follow. The default is that all bytes may.
    ///
    /// # Errors
    /// The error of the file system.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let len = self.len()?;
        Ok((offset < len).then_some((offset, len)))
    }
}

impl ReadAt for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        use rustix::{fs::SeekFrom, io::Errno};
        // The position of the descriptor is not used otherwise.
        let begin = match rustix::fs::seek(self, SeekFrom::Data(offset)) {
            Err(Errno::NXIO) => return Ok(None),
            begin => begin?,
        };
        let end = rustix::fs::seek(self, SeekFrom::Hole(begin))?;
        Ok(Some((begin, end)))
    }
}

impl ReadAt for Vec<u8> {
    fn len(&self) -> io::Result<u64> {
        Ok(self.as_slice().len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let begin = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = begin.checked_add(buffer.len());
        let source = end.and_then(|end| self.get(begin..end));
        buffer.copy_from_slice(source.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}
