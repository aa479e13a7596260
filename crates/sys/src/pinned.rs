//! Writer that copies whole pages into a memfd such that no mapping of the file sees a partly
//! written page.
//!
//! A plain `pwrite` copies from user memory. If the kernel finds the source page unmapped in the
//! middle of the copy (for example, because the page is being migrated), it fills the rest of the
//! file's page with zeros, unlocks the page, and retries. A mapping of the file may see those
//! zeros. This module first pins the source pages through a pipe (vmsplice(2), splice(2)), so that
//! the copy cannot be interrupted. A writer is unusable after a failed write.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    pipe::{IoSliceRaw, PipeFlags, SpliceFlags},
};

use crate::mapping::PAGE_BYTES;

/// Maximum number of pages pinned at once.
const MAX_PAGES: usize = 32;

/// Pipe that holds pages while they are copied.
#[derive(Debug)]
pub struct PinnedWriter {
    read: OwnedFd,
    write: OwnedFd,
    /// Capacity of the pipe, in bytes.
    capacity: usize,
}

impl PinnedWriter {
    /// Creates a writer that is fastest for up to `pages` pages per write.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn new(pages: usize) -> io::Result<Self> {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let wanted = pages.clamp(1, MAX_PAGES) * PAGE_BYTES;
        // If the kernel rejects the size (the user has too many pipes), the smaller default size is
        // sufficient.
        let capacity = rustix::pipe::fcntl_setpipe_size(&write, wanted)
            .or_else(|_| rustix::pipe::fcntl_getpipe_size(&write))?;
        Ok(Self {
            read,
            write,
            capacity,
        })
    }

    /// Writes `content` to `file` at `offset`.
    ///
    /// `content` consists of whole pages and begins at a page boundary (as a
    /// [`crate::mapping::PageBuffer`] does). `offset` is a multiple of the page size.
    ///
    /// # Errors
    /// `InvalidInput` if one of these conditions does not hold; otherwise the kernel's error.
    pub fn write_at(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        content: &[u8],
    ) -> io::Result<()> {
        let aligned = content.as_ptr().addr().is_multiple_of(PAGE_BYTES)
            && content.len().is_multiple_of(PAGE_BYTES)
            && offset.is_multiple_of(PAGE_BYTES as u64);
        if !aligned {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut at = offset;
        for piece in content.chunks(self.capacity.max(PAGE_BYTES)) {
            let mut rest = piece;
            while !rest.is_empty() {
                let pinned = self.pin(rest)?;
                self.copy(file, at, pinned)?;
                at += pinned as u64;
                rest = rest.get(pinned..).unwrap_or_default();
            }
        }
        Ok(())
    }

    /// Puts pages into the empty pipe and returns the number of bytes that the pipe accepted.
    fn pin(&self, pages: &[u8]) -> io::Result<usize> {
        let parts = [IoSliceRaw::from_slice(pages)];
        loop {
            // SAFETY: the writing end only reads the memory and the pages are not gifted to the
            // kernel: the caller keeps them borrowed until the pipe is empty again. Pages left in
            // the pipe after an error stay pinned and are never read.
            let taken =
                unsafe { rustix::pipe::vmsplice(&self.write, &parts, SpliceFlags::empty()) };
            match taken {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(taken) => return Ok(taken),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Empties the pipe into the file.
    fn copy(&self, file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<()> {
        let mut position = offset;
        let mut left = len;
        while left > 0 {
            let flags = SpliceFlags::empty();
            // The kernel advances `position`.
            let copied =
                rustix::pipe::splice(&self.read, None, file, Some(&mut position), left, flags);
            match copied {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(copied) => left = left.saturating_sub(copied),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::{fd::AsFd as _, unix::fs::FileExt as _};

    use super::*;
    use crate::mapping::PageBuffer;

    fn memfd(pages: u64) -> std::fs::File {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let memfd = rustix::fs::memfd_create("test", flags).expect("makes a memfd");
        rustix::fs::ftruncate(&memfd, pages * PAGE_BYTES as u64).expect("sizes it");
        memfd.into()
    }

    #[test]
    fn pages_are_written_at_their_offset_only() {
        let file = memfd(200);
        let mut content = PageBuffer::new(100).expect("maps");
        for (at, byte) in content.iter_mut().enumerate() {
            *byte = u8::try_from(at % 251).expect("small");
        }
        for pages in [1, 16, 32, 1000] {
            let mut writer = PinnedWriter::new(pages).expect("a pipe");
            writer
                .write_at(file.as_fd(), 50 * 4096, &content)
                .expect("writes");
            let mut read = vec![0; 200 * PAGE_BYTES];
            file.read_exact_at(&mut read, 0).expect("reads");
            let (before, rest) = read.split_at(50 * PAGE_BYTES);
            let (written, behind) = rest.split_at(100 * PAGE_BYTES);
            assert_eq!(written, &content[..]);
            assert!(before.iter().chain(behind).all(|byte| *byte == 0));
        }
    }

    #[test]
    fn partial_page_is_rejected() {
        let file = memfd(4);
        let content = PageBuffer::new(2).expect("maps");
        let mut writer = PinnedWriter::new(1).expect("a pipe");
        for (offset, part) in [
            (1, &content[..4096]),
            (0, &content[8..4104]),
            (0, &content[..9]),
        ] {
            let error = writer
                .write_at(file.as_fd(), offset, part)
                .expect_err("is not");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
        let read_only = std::fs::File::open("/proc/self/exe").expect("opens");
        assert!(writer.write_at(read_only.as_fd(), 0, &content).is_err());
    }
}
