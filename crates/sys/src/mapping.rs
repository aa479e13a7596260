//! Memory obtained from `mmap`: resident buffers, and mappings like those of a VMM.
//!
//! A [`Mapping`] is shared memory that is read and written eight bytes at a time by relaxed atomic
//! accesses, because another process may change its content at any time. A [`PageBuffer`] has one
//! owner, begins at a page boundary and is locked in memory where the limit allows that. Both are
//! unmapped on drop.

use std::{
    io,
    ops::{Deref, DerefMut},
    os::fd::BorrowedFd,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Page size on the supported machines, in bytes.
pub const PAGE_BYTES: usize = 4096;

/// Private mapping, readable and writable.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is only accessed through atomics, and its owner unmaps it once, on drop.
unsafe impl Send for Mapping {}
// SAFETY: as above; no reference into the mapping is ever handed out.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of anonymous memory.
    ///
    /// # Errors
    /// The kernel's error, or `InvalidInput` if `len` is 0.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without MAP_FIXED the kernel chooses an unused address range.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, flags) }?;
        Self::from_kernel(start.cast(), len)
    }

    /// Maps the first `len` bytes of `fd` privately. Reads come from the file; writes stay in this
    /// mapping.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn private_of(fd: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without MAP_FIXED the kernel chooses an unused address range.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) }?;
        Self::from_kernel(start.cast(), len)
    }

    fn from_kernel(start: *mut u8, len: usize) -> io::Result<Self> {
        let start = NonNull::new(start).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { start, len })
    }

    /// Returns the address of the first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start.addr().get() as u64
    }

    /// Returns the length, in bytes.
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
        // SAFETY: the value is aligned (the mapping begins at a page boundary) and lives as long as
        // `self`, and every access in this process is atomic.
        Some(unsafe { word.cast::<AtomicU64>().as_ref() })
    }

    /// Reads eight bytes at `offset`, a multiple of 8. Returns `None` outside of the mapping.
    #[must_use]
    pub fn load(&self, offset: usize) -> Option<u64> {
        Some(self.word(offset)?.load(Ordering::Relaxed))
    }

    /// Writes eight bytes at `offset`, a multiple of 8. Returns `None` outside of the mapping.
    #[must_use]
    pub fn store(&self, offset: usize, value: u64) -> Option<()> {
        self.word(offset)?.store(value, Ordering::Relaxed);
        Some(())
    }

    /// Returns a range of pages to the kernel (`MADV_DONTNEED`).
    ///
    /// # Errors
    /// `InvalidInput` for a range outside of the mapping; otherwise the kernel's error.
    pub fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the offset is within the mapping, as just checked.
        let start = unsafe { self.start.add(offset) };
        // SAFETY: the range belongs to this mapping, and no reference into it exists outside of an
        // atomic access.
        unsafe { rustix::mm::madvise(start.as_ptr().cast(), len, Advice::LinuxDontNeed) }?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this type created the mapping with this length, and no reference into it is left.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Zeroed buffer of whole pages.
///
/// The buffer is locked in memory where the limit allows that, so that a system call which reads it
/// finds every page present.
#[derive(Debug)]
pub struct PageBuffer {
    mapping: Mapping,
}

impl PageBuffer {
    /// Allocates a buffer of `pages` pages.
    ///
    /// # Errors
    /// The kernel's error, or `InvalidInput` if `pages` is 0 or too large.
    pub fn new(pages: usize) -> io::Result<Self> {
        let len = pages
            .checked_mul(PAGE_BYTES)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let mapping = Mapping::anonymous(len)?;
        // SAFETY: the range is a mapping owned by this function. A failure to lock it is ignored:
        // the buffer then behaves like ordinary memory.
        let _ = unsafe { rustix::mm::mlock(mapping.start.as_ptr().cast(), len) };
        Ok(Self { mapping })
    }
}

impl Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is anonymous, private to `self`, initialised with zeros, and lives as
        // long as `self`.
        unsafe { std::slice::from_raw_parts(self.mapping.start.as_ptr(), self.mapping.len) }
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `self` is also borrowed mutably, so no other reference exists.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.start.as_ptr(), self.mapping.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_outside_the_mapping_is_rejected() {
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
    fn buffer_is_page_aligned_and_zeroed() {
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
