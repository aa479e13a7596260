//! userfaultfd: page faults of a mapping, resolved by a process in user space.
//!
//! Owns one descriptor. The process that has the mapping (the VMM) opens and registers it; the
//! process that received the descriptor resolves the faults. This module never decides the content
//! of a page. Every failure is a [`UffdError`] on which the caller can act.
//!
//! The descriptor closes on drop. When its last copy closes, the kernel ends the registration and
//! resumes waiting threads *without* content. Every process that may still run on that memory must
//! be dead before then.
//!
//! Source: <linux/userfaultfd.h>, ioctl_userfaultfd(2), userfaultfd(2).

mod event;
mod raw;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, FromRawFd as _, OwnedFd},
};

pub use event::{Event, MAX_BATCH, MESSAGE_BYTES};

/// Features of the kernel interface, as bits of `uffdio_api.features`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// No features beyond faults of anonymous memory.
    pub const NONE: Self = Self(0);
    /// `UFFD_EVENT_REMOVE` is sent when a range is discarded by `madvise`.
    pub const EVENT_REMOVE: Self = Self(1 << 3);
    /// Missing pages of memfds and other shared memory, also where these are mapped privately.
    pub const MISSING_SHMEM: Self = Self(1 << 5);

    /// Returns the union of both sets of features.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// True if this set contains all features of `other`.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Reason why a request on a userfaultfd failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UffdError {
    /// EEXIST: the first page of the range is already present. Nothing was changed.
    #[error("the page is already present")]
    Exists,
    /// EAGAIN: the address space is changing, or a later page of the range is already present. The
    /// first `done` bytes are complete.
    #[error("interrupted after {done} bytes")]
    Again {
        /// Number of bytes done, from the start of the range; a multiple of the page size.
        done: u64,
    },
    /// ESRCH: the process with the mapping has exited.
    #[error("the process with the mapping has exited")]
    Gone,
    /// Any other error.
    #[error("{request} failed")]
    Other {
        /// Name of the request, as in the kernel's headers.
        request: &'static str,
        /// Error returned by the kernel.
        source: io::Error,
    },
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Creates a userfaultfd from an open `/dev/userfaultfd`, including faults of the kernel's own
    /// accesses (system calls, KVM). The descriptor is non-blocking and closes on exec.
    ///
    /// # Errors
    /// [`UffdError::Other`]
    pub fn from_device(device: BorrowedFd<'_>) -> Result<Self, UffdError> {
        let flags = libc::c_ulong::try_from(libc::O_CLOEXEC | libc::O_NONBLOCK).unwrap_or(0);
        // SAFETY: USERFAULTFD_IOC_NEW takes its argument by value and returns a descriptor or -1.
        let raw = unsafe { raw::ioctl_value(device, raw::USERFAULTFD_IOC_NEW, flags) };
        if raw < 0 {
            return Err(raw::last_error("USERFAULTFD_IOC_NEW"));
        }
        // SAFETY: the descriptor was created for this call and has no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { fd })
    }

    /// Creates a userfaultfd from `/dev/userfaultfd`, or by the system call if that device cannot
    /// be opened.
    ///
    /// # Errors
    /// [`UffdError::Other`] of the system call, which needs CAP_SYS_PTRACE or
    /// `vm.unprivileged_userfaultfd=1`.
    pub fn open() -> Result<Self, UffdError> {
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
        if let Ok(device) = rustix::fs::open(c"/dev/userfaultfd", flags, rustix::fs::Mode::empty())
        {
            return Self::from_device(device.as_fd());
        }
        // SAFETY: the system call takes its argument by value and returns a descriptor or -1.
        let raw =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let raw = i32::try_from(raw).unwrap_or(-1);
        if raw < 0 {
            return Err(raw::last_error("userfaultfd"));
        }
        // SAFETY: the descriptor was created for this call and has no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { fd })
    }

    /// Wraps a descriptor that another process created and sent. A descriptor of another kind is
    /// only detected by the first request.
    #[must_use]
    pub fn from_received(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Negotiates the interface with the kernel and returns the enabled features. Must be called
    /// once, before any other request.
    ///
    /// # Errors
    /// [`UffdError::Other`] if a feature of `required` is not available; features of `optional` may
    /// be missing.
    pub fn handshake(&self, required: Features, optional: Features) -> Result<Features, UffdError> {
        let wanted = required.and(optional);
        match self.request_api(wanted) {
            Ok(()) => Ok(wanted),
            Err(_) if optional != Features::NONE => {
                self.request_api(required)?;
                Ok(required)
            }
            Err(error) => Err(error),
        }
    }

    fn request_api(&self, features: Features) -> Result<(), UffdError> {
        let mut request = raw::Api {
            api: raw::UFFD_API,
            features: features.0,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API reads and writes one `Api`.
        match unsafe { raw::ioctl(self.fd.as_fd(), raw::UFFDIO_API, &mut request) } {
            0 => Ok(()),
            _ => Err(raw::last_error("UFFDIO_API")),
        }
    }

    /// Registers a mapping of the process that created the descriptor. From then on its missing
    /// pages are reported as events.
    ///
    /// `start` and `len` are multiples of the page size.
    ///
    /// # Errors
    /// [`UffdError::Other`]
    pub fn register_missing(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let mut request = raw::Register {
            range: raw::Range { start, len },
            mode: raw::REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER reads and writes one `Register`. Accesses to the range may block
        // from now on, but never see content that the fault handler did not install.
        match unsafe { raw::ioctl(self.fd.as_fd(), raw::UFFDIO_REGISTER, &mut request) } {
            0 => Ok(()),
            _ => Err(raw::last_error("UFFDIO_REGISTER")),
        }
    }

    /// Installs `content` at `address`, page by page, and wakes the threads that wait for these
    /// pages.
    ///
    /// # Errors
    /// [`UffdError`]; after [`UffdError::Again`] the caller continues after the bytes that are
    /// done.
    pub fn copy(&self, address: u64, content: &[u8]) -> Result<(), UffdError> {
        let len = content.len() as u64;
        let mut request = raw::Copy {
            dst: address,
            src: content.as_ptr().addr() as u64,
            len,
            mode: 0,
            copy: 0,
        };
        // SAFETY: UFFDIO_COPY reads and writes one `Copy` and reads `len` bytes at `src`, which
        // `content` keeps alive. The request only fills missing pages of a registered range, into
        // which no reference can exist.
        let result = unsafe { raw::ioctl(self.fd.as_fd(), raw::UFFDIO_COPY, &mut request) };
        raw::outcome("UFFDIO_COPY", result, request.copy, len)
    }

    /// Fills `len` bytes at `address` with zeros, page by page, and wakes the threads that wait for
    /// these pages.
    ///
    /// # Errors
    /// [`UffdError`]; after [`UffdError::Again`] the caller continues after the bytes that are
    /// done.
    pub fn zero(&self, address: u64, len: u64) -> Result<(), UffdError> {
        let mut request = raw::Zero {
            range: raw::Range {
                start: address,
                len,
            },
            mode: 0,
            zeroed: 0,
        };
        // SAFETY: UFFDIO_ZEROPAGE reads and writes one `Zero` and only fills missing pages, as
        // above.
        let result = unsafe { raw::ioctl(self.fd.as_fd(), raw::UFFDIO_ZEROPAGE, &mut request) };
        raw::outcome("UFFDIO_ZEROPAGE", result, request.zeroed, len)
    }

    /// Wakes every thread that waits for a page in the range. Each thread retries its access.
    ///
    /// # Errors
    /// [`UffdError::Other`]
    pub fn wake(&self, address: u64, len: u64) -> Result<(), UffdError> {
        let mut request = raw::Range {
            start: address,
            len,
        };
        // SAFETY: UFFDIO_WAKE reads one `Range`.
        match unsafe { raw::ioctl(self.fd.as_fd(), raw::UFFDIO_WAKE, &mut request) } {
            0 => Ok(()),
            _ => Err(raw::last_error("UFFDIO_WAKE")),
        }
    }

    /// Reads up to [`MAX_BATCH`] events without waiting and appends them to `events`.
    ///
    /// # Errors
    /// [`UffdError::Other`]; having no event to read is not an error.
    pub fn read_events(&self, events: &mut Vec<Event>) -> Result<(), UffdError> {
        let mut messages = [0_u8; MAX_BATCH * MESSAGE_BYTES];
        let other = |source: io::Error| UffdError::Other {
            request: "reading events",
            source,
        };
        let bytes = match rustix::io::read(&self.fd, &mut messages) {
            Ok(bytes) => bytes,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(other(error.into())),
        };
        let read = messages.get(..bytes).unwrap_or_default();
        for message in read.chunks_exact(MESSAGE_BYTES) {
            events.push(Event::decode(message).map_err(other)?);
        }
        Ok(())
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Mapping;

    const PAGE: u64 = 4096;

    fn registered(pages: usize) -> (Uffd, Mapping) {
        let uffd = Uffd::open().expect("opens");
        let features = uffd
            .handshake(Features::NONE, Features::EVENT_REMOVE)
            .expect("agrees");
        assert!(features.has(Features::EVENT_REMOVE));
        let mapping = Mapping::anonymous(pages * 4096).expect("maps");
        uffd.register_missing(mapping.address(), mapping.len() as u64)
            .expect("registers");
        (uffd, mapping)
    }

    #[test]
    fn a_copied_page_is_read_without_a_fault_and_copied_once() {
        let (uffd, mapping) = registered(4);
        let content = [7_u8; 8192];
        uffd.copy(mapping.address(), &content).expect("copies");
        assert_eq!(mapping.load(8184), Some(0x0707_0707_0707_0707));
        assert!(matches!(
            uffd.copy(mapping.address(), &content),
            Err(UffdError::Exists)
        ));
        uffd.zero(mapping.address() + 3 * PAGE, PAGE)
            .expect("zeroes");
        match uffd.zero(mapping.address() + 2 * PAGE, 2 * PAGE) {
            Err(UffdError::Again { done }) => assert_eq!(done, PAGE),
            other => panic!("the second page exists: {other:?}"),
        }
        assert_eq!(mapping.load(3 * 4096), Some(0));
    }

    #[test]
    fn a_missing_page_is_an_event_and_its_content_wakes_the_reader() {
        let (uffd, mapping) = registered(1);
        let (value, events) = std::thread::scope(|scope| {
            let reader = scope.spawn(|| mapping.load(16));
            let mut events = Vec::new();
            while events.is_empty() {
                uffd.read_events(&mut events).expect("reads");
            }
            uffd.copy(mapping.address(), &[9; 4096]).expect("copies");
            (reader.join().expect("reads"), events)
        });
        assert_eq!(value, Some(0x0909_0909_0909_0909));
        assert_eq!(
            events,
            [Event::Fault {
                address: mapping.address(),
                missing: true
            }]
        );
    }

    #[test]
    fn descriptor_of_another_kind_is_rejected() {
        let null = std::fs::File::open("/dev/null").expect("opens");
        let uffd = Uffd::from_received(null.into());
        let error = uffd.wake(0, 4096).expect_err("is no userfaultfd");
        assert!(error.to_string().contains("UFFDIO_WAKE"), "{error}");
    }
}
