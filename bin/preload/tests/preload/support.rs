//! Starts a program with the library and serves its memory.

use std::{
    fs::File,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    process::{Child, Command},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    fs::{MemfdFlags, Mode, OFlags},
    io::FdFlags,
};
use wrenn_pager::{
    Backing, Extent, Handshake, HandshakeError, MemorySource, Options, PageServer, Regions,
    SourceError, handshake,
};

pub(crate) const PATH: &str = "/wrenn/guest-memory";
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Returns the path of the library that was built for these tests.
pub(crate) fn library() -> PathBuf {
    let program = std::env::current_exe().expect("has a path");
    let deps = program.parent().expect("is in a directory");
    let places = [deps, deps.parent().expect("is in a directory")];
    let mut paths = places.iter().map(|place| place.join("libwrenn_preload.so"));
    paths.find(|path| path.exists()).expect("was built")
}

/// Resources that a supervisor holds for one VM: the memory, writable and read-only, and both ends
/// of the socket.
pub(crate) struct Host {
    pub(crate) memory: OwnedFd,
    pub(crate) read_only: OwnedFd,
    pub(crate) server_end: UnixStream,
    pub(crate) machine_end: UnixStream,
    pub(crate) device: OwnedFd,
    pub(crate) cancel: OwnedFd,
}

impl Host {
    pub(crate) fn new(len: u64) -> Self {
        let flags = MemfdFlags::CLOEXEC;
        let memory = rustix::fs::memfd_create("guest", flags).expect("makes a memfd");
        rustix::fs::ftruncate(&memory, len).expect("sizes it");
        rustix::fs::fchmod(&memory, Mode::RUSR).expect("restricts it");
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let read_only = rustix::fs::open(path, flags, Mode::empty()).expect("opens");
        let (server_end, machine_end) = UnixStream::pair().expect("a pair");
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd")
            .expect("opens");
        let cancel = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC);
        Self {
            memory,
            read_only,
            server_end,
            machine_end,
            device: device.into(),
            cancel: cancel.expect("an eventfd"),
        }
    }

    /// Starts `command` with the library and its environment variables.
    pub(crate) fn spawn(&self, command: &mut Command, mode: &str) -> Child {
        command
            .env("LD_PRELOAD", library())
            .env("WRENN_MEMORY_PATH", PATH)
            .env("WRENN_MEMORY_MODE", mode);
        let inherited: [(&str, BorrowedFd<'_>); 3] = [
            ("WRENN_MEMORY_FD", self.read_only.as_fd()),
            ("WRENN_PAGER_SOCKET_FD", self.machine_end.as_fd()),
            ("WRENN_UFFD_DEVICE_FD", self.device.as_fd()),
        ];
        for (name, fd) in inherited {
            command.env(name, fd.as_raw_fd().to_string());
            rustix::io::fcntl_setfd(fd, FdFlags::empty()).expect("sets flags");
        }
        let child = command.spawn().expect("starts");
        for (_, fd) in inherited {
            rustix::io::fcntl_setfd(fd, FdFlags::CLOEXEC).expect("sets flags");
        }
        child
    }

    pub(crate) fn handshake(&self) -> Result<Handshake, HandshakeError> {
        handshake::receive(
            &self.server_end,
            self.cancel.as_fd(),
            Instant::now() + DEADLINE,
        )
    }

    pub(crate) fn layout(&self) -> Result<Regions, HandshakeError> {
        let deadline = Instant::now() + DEADLINE;
        handshake::receive_layout(&self.server_end, self.cancel.as_fd(), deadline)
    }

    pub(crate) fn serve(&self, handshake: Handshake, source: Numbers) -> PageServer {
        let backing = Backing::Shared(self.memory.try_clone().expect("a copy"));
        let options = Options::default();
        PageServer::start(handshake, backing, Arc::new(source), options).expect("starts")
    }
}

/// Memory in which every eight bytes hold their own offset, except that every fourth page is zero.
#[derive(Clone, Copy)]
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn word(self, offset: u64) -> u64 {
        if (offset / 4096).is_multiple_of(4) {
            0
        } else {
            offset
        }
    }

    /// Returns the sum that the program computes over the same memory.
    pub(crate) fn sum(self) -> u64 {
        let words = (0..self.0).step_by(8).map(|offset| self.word(offset));
        let bytes = words.flat_map(u64::to_ne_bytes);
        bytes.fold(0, |sum: u64, byte| sum.rotate_left(1) ^ u64::from(byte))
    }
}

impl MemorySource for Numbers {
    fn len(&self) -> u64 {
        self.0
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        let zero = (offset / 4096).is_multiple_of(4);
        let len = if zero {
            4096
        } else {
            4096 * (4 - offset / 4096 % 4)
        };
        let len = len.min(self.0 - offset);
        Ok(Extent { zero, len })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        for (at, bytes) in (offset..).step_by(8).zip(buf.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&self.word(at).to_ne_bytes());
        }
        Ok(())
    }
}
