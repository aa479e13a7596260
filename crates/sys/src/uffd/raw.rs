//! Structures and request numbers of <linux/userfaultfd.h>, and the `ioctl` call that takes them.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use super::UffdError;

pub(super) const UFFD_API: u64 = 0xAA;
pub(super) const REGISTER_MODE_MISSING: u64 = 1;

// `_IO`, `_IOR` and `_IOWR` of the type 0xAA: direction, size of the structure, number.
pub(super) const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xAA00;
pub(super) const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
pub(super) const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
pub(super) const UFFDIO_WAKE: libc::c_ulong = 0x8010_AA02;
pub(super) const UFFDIO_COPY: libc::c_ulong = 0xC028_AA03;
pub(super) const UFFDIO_ZEROPAGE: libc::c_ulong = 0xC020_AA04;

#[repr(C)]
pub(super) struct Api {
    pub(super) api: u64,
    pub(super) features: u64,
    pub(super) ioctls: u64,
}

#[repr(C)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) len: u64,
}

#[repr(C)]
pub(super) struct Register {
    pub(super) range: Range,
    pub(super) mode: u64,
    pub(super) ioctls: u64,
}

#[repr(C)]
pub(super) struct Copy {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) copy: i64,
}

#[repr(C)]
pub(super) struct Zero {
    pub(super) range: Range,
    pub(super) mode: u64,
    pub(super) zeroed: i64,
}

// The size is part of each request number.
const _: () = assert!(size_of::<Api>() == 0x18);
const _: () = assert!(size_of::<Range>() == 0x10);
const _: () = assert!(size_of::<Register>() == 0x20);
const _: () = assert!(size_of::<Copy>() == 0x28);
const _: () = assert!(size_of::<Zero>() == 0x20);

/// Sends one request and retries when a signal interrupts the call.
///
/// # Safety
/// `request` reads and writes no more than one `T`, except for memory that `T` refers to and the
/// caller is responsible for.
pub(super) unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: libc::c_ulong, argument: &mut T) -> i32 {
    loop {
        let argument: *mut T = argument;
        // SAFETY: `fd` is open while it is borrowed, and the pointer is valid for one `T`. The
        // caller guarantees that the request takes a `T`.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
        if result < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
            continue;
        }
        return result;
    }
}

/// Sends one request whose argument is a number.
///
/// # Safety
/// `request` takes its argument by value.
pub(super) unsafe fn ioctl_value(
    fd: BorrowedFd<'_>,
    request: libc::c_ulong,
    argument: libc::c_ulong,
) -> i32 {
    // SAFETY: `fd` is open while it is borrowed; the caller guarantees that the request touches no
    // memory.
    unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) }
}

pub(super) fn last_error(request: &'static str) -> UffdError {
    UffdError::Other {
        request,
        source: io::Error::last_os_error(),
    }
}

/// Returns the result of a request that may stop part-way. `done` is the kernel's count, or a
/// negative error number.
pub(super) fn outcome(
    request: &'static str,
    result: i32,
    done: i64,
    len: u64,
) -> Result<(), UffdError> {
    if result == 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    match source.raw_os_error() {
        Some(libc::EEXIST) => Err(UffdError::Exists),
        Some(libc::EAGAIN) => Err(UffdError::Again {
            done: u64::try_from(done).unwrap_or(0).min(len),
        }),
        Some(libc::ESRCH) => Err(UffdError::Gone),
        _ => Err(UffdError::Other { request, source }),
    }
}
