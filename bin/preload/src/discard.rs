//! Interposed `fallocate` and `madvise`: memory that the guest gives back.
//!
//! QEMU discards a range of guest memory in two steps: it punches a hole into the file, and then
//! drops its mapping of the range. The next access is to find the hole, and so zeros.
//!
//! | mode        | `fallocate` on guest memory | `madvise` on guest memory                           |
//! |-------------|-----------------------------|-----------------------------------------------------|
//! | `anonymous` | nothing, reports success    | passed on: the range has no content afterwards      |
//! | `paged`     | nothing, reports success    | drops the VM's own pages, then maps the zero page   |
//!
//! In the mode `paged` the file is the snapshot's memory, which other VMs use. It is read-only here
//! and never changes. Dropping the mapping alone would make the snapshot's old content visible. The
//! range is therefore mapped to the kernel's zero page, which takes no memory except page tables. A
//! write replaces the zero page by a page of this VM, as usual. When a snapshot is taken, the
//! supervisor finds the zero page in the page tables.
//!
//! The alternatives are in `docs/decisions/0026`.
//!
//! `fallocate` on other files and `madvise` on other addresses go to the kernel.
//!
//! A thread that waits for a page of the range is woken by the zero page. The page server may load
//! the page at the same time: it only writes to the file, which the mapping of the zero page hides.

use std::{
    ffi::{c_int, c_void},
    sync::atomic::Ordering,
};

use wrenn_sys::{
    mapping::PAGE_BYTES,
    uffd::{Uffd, UffdError},
};

use crate::{config, report::fatal};

/// Maximum number of pages per range that are dropped a second time.
const MAX_TRIES: usize = 64;

/// # Safety
/// As for the C library's function.
#[unsafe(no_mangle)]
unsafe extern "C" fn fallocate(fd: c_int, mode: c_int, offset: i64, len: i64) -> c_int {
    allocate(fd, mode, offset, len)
}

/// # Safety
/// As for the C library's function.
#[unsafe(no_mangle)]
unsafe extern "C" fn fallocate64(fd: c_int, mode: c_int, offset: i64, len: i64) -> c_int {
    allocate(fd, mode, offset, len)
}

/// # Safety
/// As for the C library's function.
#[unsafe(no_mangle)]
unsafe extern "C" fn madvise(address: *mut c_void, len: usize, advice: c_int) -> c_int {
    let Some(uffd) = discarded(address.addr(), len, advice) else {
        // SAFETY: guaranteed by the caller.
        return unsafe { advise(address, len, advice) };
    };
    if !address.addr().is_multiple_of(PAGE_BYTES) || !len.is_multiple_of(PAGE_BYTES) {
        fatal(&["attempt to discard a part of a page of guest memory"]);
    }
    // SAFETY: the caller discards this range.
    unsafe { zero(uffd, address, len) };
    0
}

fn allocate(fd: c_int, mode: c_int, offset: i64, len: i64) -> c_int {
    if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 && is_guest_memory(fd) {
        return 0;
    }
    // SAFETY: `fallocate` takes its arguments by value.
    let result = unsafe { libc::syscall(libc::SYS_fallocate, fd, mode, offset, len) };
    c_int::try_from(result).unwrap_or(-1)
}

/// # Safety
/// As for the C library's `madvise`.
unsafe fn advise(address: *mut c_void, len: usize, advice: c_int) -> c_int {
    // SAFETY: the arguments are the caller's.
    let result = unsafe { libc::syscall(libc::SYS_madvise, address, len, advice) };
    c_int::try_from(result).unwrap_or(-1)
}

fn is_guest_memory(fd: c_int) -> bool {
    config::get().is_some_and(|config| {
        config::look_at(fd).is_some_and(|(identity, _)| identity == config.identity)
    })
}

/// Returns the userfaultfd if the call discards a part of guest memory whose faults the page server
/// handles.
fn discarded(address: usize, len: usize, advice: c_int) -> Option<&'static Uffd> {
    if advice != libc::MADV_DONTNEED && advice != libc::MADV_REMOVE {
        return None;
    }
    let config = config::get()?;
    let uffd = config.uffd.get()?;
    let start = config.start.load(Ordering::SeqCst);
    let (end, last) = (
        start.saturating_add(config.len),
        address.saturating_add(len),
    );
    if start == 0 || last <= start || address >= end {
        return None;
    }
    if address < start || last > end {
        fatal(&["attempt to discard memory beyond the bounds of guest memory"]);
    }
    Some(uffd)
}

/// Drops the pages of a range and maps the zero page in their places. All pages are zeros
/// afterwards, whatever other threads do with them.
///
/// # Safety
/// The range is guest memory that the caller discards.
unsafe fn zero(uffd: &Uffd, start: *mut c_void, len: usize) {
    let (mut at, mut tries) = (0, 0);
    // SAFETY: guaranteed by the caller.
    unsafe { drop_pages(start, len) };
    while at < len {
        let place = start.wrapping_byte_add(at);
        match uffd.zero(place.addr() as u64, (len - at) as u64) {
            Ok(()) => return,
            // Another thread has mapped the page of the snapshot in the meantime.
            Err(UffdError::Exists) if tries < MAX_TRIES => {
                tries += 1;
                // SAFETY: the page is in the range.
                unsafe { drop_pages(place, PAGE_BYTES) };
            }
            // The guest reads the page all the time although it reported the page as free. It must
            // not stay mapped to the snapshot: a later snapshot would take it for unchanged, even
            // if an earlier one contains what the guest had written to it.
            Err(UffdError::Exists) => {
                // SAFETY: the page is in the range, which the guest gave back.
                unsafe { place.cast::<u8>().write_bytes(0, PAGE_BYTES) };
                at += PAGE_BYTES;
            }
            Err(UffdError::Again { done }) => at += usize::try_from(done).unwrap_or(0),
            Err(_) => fatal(&["failed to zero discarded guest memory"]),
        }
    }
}

/// # Safety
/// The range is guest memory that the caller discards.
unsafe fn drop_pages(start: *mut c_void, len: usize) {
    // SAFETY: guaranteed by the caller.
    if unsafe { advise(start, len, libc::MADV_DONTNEED) } != 0 {
        fatal(&["failed to discard guest memory"]);
    }
}
