//! Memory of our own from `mmap`: buffers that stay resident, and mappings as a VMM makes them.
//!
//! A [`Mapping`] is shared, unordered memory, read and written eight bytes at a time by atomic accesses, because another
//! process may change it at any moment. A [`PageBuffer`] belongs to one owner, begins at a page and is locked in memory
//! where the limit allows it. Both are unmapped on drop.

use std::{
    io,
    ops::{Deref, DerefMut},
    os::fd::BorrowedFd,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Size of a page on the machines that we run on, bytes.
pub const PAGE_BYTES: usize = 4096;

/// A private mapping, readable and writable.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is only accessed through atomics, and unmapped by whoever drops it, once.
unsafe impl Send for Mapping {}
// SAFETY: as above; no reference into it is ever handed out.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of anonymous memory.
    ///
    /// # Errors
    /// What the kernel says, or `InvalidInput` for no bytes at all.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, flags) }?;
        Self::from_kernel(start.cast(), len)
    }

    /// Maps the first `len` bytes of `fd` privately: reads come from the file, writes stay here.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn private_of(fd: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) }?;
        Self::from_kernel(start.cast(), len)
    }

    fn from_kernel(start: *mut u8, len: usize) -> io::Result<Self> {
        let start = NonNull::new(start).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { start, len })
    }

    /// Address of the first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start.addr().get() as u64
    }

    /// Length, bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    fn word(&self, offset: usize) -> Option<&AtomicU64> {
        if !offset.is_multiple_of(8) || offset.checked_add(8)? > self.len {
            return None;
        }
        // SAFETY: the offset is within the mapping, as just checked.
        let word = unsafe { self.start.add(offset) };
        // SAFETY: the word is aligned (the mapping begins at a page), lives as long as `self`, and every access in this
        // process is atomic.
        Some(unsafe { word.cast::<AtomicU64>().as_ref() })
    }

    /// Reads eight bytes at `offset`, a multiple of 8; None outside of the mapping.
    #[must_use]
    pub fn load(&self, offset: usize) -> Option<u64> {
        Some(self.word(offset)?.load(Ordering::Relaxed))
    }

    /// Writes eight bytes at `offset`, a multiple of 8; None outside of the mapping.
    #[must_use]
    pub fn store(&self, offset: usize, value: u64) -> Option<()> {
        self.word(offset)?.store(value, Ordering::Relaxed);
        Some(())
    }

    /// Gives a range back to the kernel (`MADV_DONTNEED`).
    ///
    /// # Errors
    /// `InvalidInput` for a range outside of the mapping; else what the kernel says.
    pub fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the offset is within the mapping, as just checked.
        let start = unsafe { self.start.add(offset) };
        // SAFETY: the range is ours alone, and no reference into it exists outside of an atomic access.
        unsafe { rustix::mm::madvise(start.as_ptr().cast(), len, Advice::LinuxDontNeed) }?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by us with this length, and nothing refers to it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// A zeroed buffer of whole pages.
///
/// Locked in memory where the limit allows it, so that a system call which reads it finds every page.
#[derive(Debug)]
pub struct PageBuffer {
    mapping: Mapping,
}

impl PageBuffer {
    /// A buffer of `pages` pages.
    ///
    /// # Errors
    /// What the kernel says, or `InvalidInput` for no pages or too many.
    pub fn new(pages: usize) -> io::Result<Self> {
        let len = pages
            .checked_mul(PAGE_BYTES)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let mapping = Mapping::anonymous(len)?;
        // SAFETY: the range is a mapping of ours. That it cannot be locked is no failure: it is then like other memory.
        let _ = unsafe { rustix::mm::mlock(mapping.start.as_ptr().cast(), len) };
        Ok(Self { mapping })
    }
}

impl Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is anonymous and private to `self`, initialised with zeros, and lives as long.
        unsafe { std::slice::from_raw_parts(self.mapping.start.as_ptr(), self.mapping.len) }
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed for writing, so no other reference exists.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.start.as_ptr(), self.mapping.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_outside_are_refused() {
        let mapping = Mapping::anonymous(4096).expect("maps");
        assert_eq!(mapping.load(4088), Some(0));
        assert_eq!(mapping.load(4096), None);
        assert_eq!(mapping.load(4), None);
        assert_eq!(mapping.load(usize::MAX - 7), None);
        assert_eq!(mapping.store(8, 3), Some(()));
        assert_eq!(mapping.load(8), Some(3));
        assert!(mapping.discard(0, 8192).is_err());
        mapping.discard(0, 4096).expect("discards");
        assert_eq!(mapping.load(8), Some(0));
    }

    #[test]
    fn a_buffer_begins_at_a_page_and_holds_zeros() {
        let mut buffer = PageBuffer::new(3).expect("maps");
        assert_eq!(buffer.len(), 3 * 4096);
        assert_eq!(buffer.as_ptr().addr() % 4096, 0);
        assert!(buffer.iter().all(|byte| *byte == 0));
        buffer[5000] = 1;
        assert_eq!(buffer[5000], 1);
        assert!(PageBuffer::new(usize::MAX).is_err());
        assert!(PageBuffer::new(0).is_err());
    }
}
