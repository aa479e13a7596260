//! userfaultfd: page faults of a mapping answered by a process of ours.
//!
//! Owns one descriptor. Opening and registering happens in the process that has the mapping (the VMM); answering happens
//! wherever the descriptor was sent to. It never decides what a page holds. Every failure is a [`UffdError`] that the
//! caller can act upon; the descriptor closes on drop, and with its last copy the kernel ends the registration and lets
//! waiting threads go on *without* content: whoever may still run on that memory must be dead before.
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
    /// Nothing beyond faults of anonymous memory.
    pub const NONE: Self = Self(0);
    /// `UFFD_EVENT_REMOVE` is sent when a range is given back by `madvise`.
    pub const EVENT_REMOVE: Self = Self(1 << 3);
    /// Missing pages of memfds and other shared memory, also where they are mapped privately.
    pub const MISSING_SHMEM: Self = Self(1 << 5);

    /// Both sets of features.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is in here.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Why a request on a userfaultfd failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UffdError {
    /// EEXIST: the first page of the range is there already. Nothing was done.
    #[error("the page is there already")]
    Exists,
    /// EAGAIN: the address space is changing, or a page further on exists; what was done before counts.
    #[error("interrupted after {done} bytes")]
    Again {
        /// Bytes from the start of the range that are done; a multiple of the page size.
        done: u64,
    },
    /// ESRCH: the process with the mapping is gone.
    #[error("the process is gone")]
    Gone,
    /// Anything else.
    #[error("{request} failed")]
    Other {
        /// The request, as the kernel's headers call it.
        request: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Makes one from an open `/dev/userfaultfd`; faults in the kernel's own accesses (system calls, KVM) are included.
    /// It is non-blocking and closes on exec.
    ///
    /// # Errors
    /// [`UffdError::Other`]
    pub fn from_device(device: BorrowedFd<'_>) -> Result<Self, UffdError> {
        let flags = libc::c_ulong::try_from(libc::O_CLOEXEC | libc::O_NONBLOCK).unwrap_or(0);
        // SAFETY: USERFAULTFD_IOC_NEW takes its argument by value and answers with a descriptor or -1.
        let raw = unsafe { raw::ioctl_value(device, raw::USERFAULTFD_IOC_NEW, flags) };
        if raw < 0 {
            return Err(raw::last_error("USERFAULTFD_IOC_NEW"));
        }
        // SAFETY: the descriptor was made for this call and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { fd })
    }

    /// Makes one by `/dev/userfaultfd`, and where that cannot be opened by the system call.
    ///
    /// # Errors
    /// [`UffdError::Other`] of the system call, which needs CAP_SYS_PTRACE or `vm.unprivileged_userfaultfd=1`.
    pub fn open() -> Result<Self, UffdError> {
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
        if let Ok(device) = rustix::fs::open(c"/dev/userfaultfd", flags, rustix::fs::Mode::empty())
        {
            return Self::from_device(device.as_fd());
        }
        // SAFETY: the system call takes its argument by value and answers with a descriptor or -1.
        let raw =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let raw = i32::try_from(raw).unwrap_or(-1);
        if raw < 0 {
            return Err(raw::last_error("userfaultfd"));
        }
        // SAFETY: the descriptor was made for this call and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { fd })
    }

    /// Takes a descriptor that another process made and sent. Whether it is one shows at the first request.
    #[must_use]
    pub fn from_received(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Agrees with the kernel on the interface: once, before anything else. Answers with the features that are on.
    ///
    /// # Errors
    /// [`UffdError::Other`] if `required` is not to be had; `optional` may be missing.
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

    /// Registers a mapping of the process that made the descriptor: from now on its missing pages are events.
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
        // SAFETY: UFFDIO_REGISTER reads and writes one `Register`. Accesses to the range may wait from here on, but never
        // see anything that the one who answers did not put there.
        match unsafe { raw::ioctl(self.fd.as_fd(), raw::UFFDIO_REGISTER, &mut request) } {
            0 => Ok(()),
            _ => Err(raw::last_error("UFFDIO_REGISTER")),
        }
    }

    /// Installs `content` at `address`, a page at a time, and wakes who waits for them.
    ///
    /// # Errors
    /// [`UffdError`]; after [`UffdError::Again`] the caller goes on behind what is done.
    pub fn copy(&self, address: u64, content: &[u8]) -> Result<(), UffdError> {
        let len = content.len() as u64;
        let mut request = raw::Copy {
            dst: address,
            src: content.as_ptr().addr() as u64,
            len,
            mode: 0,
            copy: 0,
        };
        // SAFETY: UFFDIO_COPY reads and writes one `Copy` and reads `len` bytes at `src`, which `content` keeps alive. It
        // fills pages of a registered range that are missing, which nobody can hold a reference into.
        let result = unsafe { raw::ioctl(self.fd.as_fd(), raw::UFFDIO_COPY, &mut request) };
        raw::outcome("UFFDIO_COPY", result, request.copy, len)
    }

    /// Makes `len` bytes at `address` zero, a page at a time, and wakes who waits for them.
    ///
    /// # Errors
    /// [`UffdError`]; after [`UffdError::Again`] the caller goes on behind what is done.
    pub fn zero(&self, address: u64, len: u64) -> Result<(), UffdError> {
        let mut request = raw::Zero {
            range: raw::Range {
                start: address,
                len,
            },
            mode: 0,
            zeroed: 0,
        };
        // SAFETY: UFFDIO_ZEROPAGE reads and writes one `Zero`; it fills missing pages only, as above.
        let result = unsafe { raw::ioctl(self.fd.as_fd(), raw::UFFDIO_ZEROPAGE, &mut request) };
        raw::outcome("UFFDIO_ZEROPAGE", result, request.zeroed, len)
    }

    /// Wakes every thread that waits for a page in the range; each looks again.
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

    /// Reads up to [`MAX_BATCH`] events without waiting, and appends them to `events`.
    ///
    /// # Errors
    /// [`UffdError::Other`]; that there is none to read is no error.
    pub fn read_events(&self, events: &mut Vec<Event>) -> Result<(), UffdError> {
        let mut messages = [0_u8; MAX_BATCH * MESSAGE_BYTES];
        let other = |source: io::Error| UffdError::Other {
            request: "read of events",
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
    fn a_descriptor_of_another_kind_is_refused() {
        let null = std::fs::File::open("/dev/null").expect("opens");
        let uffd = Uffd::from_received(null.into());
        let error = uffd.wake(0, 4096).expect_err("is no userfaultfd");
        assert!(error.to_string().contains("UFFDIO_WAKE"), "{error}");
    }
}
