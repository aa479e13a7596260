//! Faulting process and memory with known content.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::net::UnixListener,
    },
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use tempfile::TempDir;
use wrenn_pager::{
    Backing, Extent, Handshake, MemorySource, Options, PageServer, SourceError, handshake,
};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Polls until `condition` holds.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::yield_now();
    }
}

/// Computable content: pages of zeros mixed with pages of numbers.
pub(crate) struct Pattern {
    seed: u64,
    len: u64,
    /// A page is zero if its hash modulo this value is 0. 0 means no zero pages, 1 means only zero
    /// pages.
    zero_every: u64,
    /// Page whose reads fail.
    pub(crate) broken: Option<u64>,
    /// Page whose reads wait until the door is open.
    pub(crate) guarded: Option<u64>,
    pub(crate) door: Door,
    pub(crate) reads: AtomicU64,
}

#[derive(Default)]
pub(crate) struct Door {
    state: Mutex<(bool, u64)>,
    changed: Condvar,
}

impl Door {
    pub(crate) fn open(&self) {
        self.state.lock().0 = true;
        self.changed.notify_all();
    }

    /// Returns the number of reads that wait or have waited.
    pub(crate) fn arrived(&self) -> u64 {
        self.state.lock().1
    }

    fn pass(&self) {
        let mut state = self.state.lock();
        state.1 += 1;
        while !state.0 {
            self.changed.wait(&mut state);
        }
    }
}

fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

impl Pattern {
    pub(crate) fn new(pages: u64, zero_every: u64) -> Self {
        Self {
            seed: 0x5eed + pages,
            len: pages * PAGE,
            zero_every,
            broken: None,
            guarded: None,
            door: Door::default(),
            reads: AtomicU64::new(0),
        }
    }

    pub(crate) fn is_zero(&self, offset: u64) -> bool {
        let hash = mix(self.seed ^ (offset / PAGE));
        self.zero_every > 0 && hash.is_multiple_of(self.zero_every)
    }

    pub(crate) fn data_pages(&self) -> u64 {
        (0..self.len / PAGE)
            .filter(|page| !self.is_zero(page * PAGE))
            .count() as u64
    }

    /// Returns the eight bytes at `offset`.
    pub(crate) fn word(&self, offset: u64) -> u64 {
        if self.is_zero(offset) {
            return 0;
        }
        mix(self.seed.wrapping_add(offset)) | 1
    }

    /// Returns the checksum that the faulting process computes over the same range.
    pub(crate) fn checksum(&self, offset: u64, len: u64) -> u64 {
        checksum((offset..offset + len).step_by(8).map(|at| self.word(at)))
    }
}

pub(crate) fn checksum(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0xcbf2_9ce4_8422_2325_u64, |sum, word| {
        (sum ^ word).wrapping_mul(0x0100_0000_01b3)
    })
}

impl MemorySource for Pattern {
    fn len(&self) -> u64 {
        self.len
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        let zero = self.is_zero(offset);
        let mut end = offset + PAGE;
        while end < self.len && self.is_zero(end) == zero {
            end += PAGE;
        }
        Ok(Extent {
            zero,
            len: end - offset,
        })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let pages = offset..offset + buf.len() as u64;
        if self.guarded.is_some_and(|page| pages.contains(&page)) {
            self.door.pass();
        }
        if self.broken.is_some_and(|page| pages.contains(&page)) {
            return Err(SourceError::Read {
                file: "/snapshots/g7/memory.diff".into(),
                offset,
                len: buf.len() as u64,
                source: std::io::ErrorKind::UnexpectedEof.into(),
            });
        }
        for (at, bytes) in (offset..).step_by(8).zip(buf.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&self.word(at).to_ne_bytes());
        }
        Ok(())
    }
}

/// Creates a memfd of `len` bytes without content.
pub(crate) fn memfd(len: u64) -> OwnedFd {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let fd = rustix::fs::memfd_create("guest", flags).expect("makes a memfd");
    rustix::fs::ftruncate(&fd, len).expect("sizes it");
    fd
}

/// Returns the number of bytes allocated in the memfd.
pub(crate) fn filled(memfd: &OwnedFd) -> u64 {
    let stat = rustix::fs::fstat(memfd).expect("stat");
    u64::try_from(stat.st_blocks).expect("a count") * 512
}

/// Process with memory whose faults this test resolves.
pub(crate) struct Faulter {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub(crate) base: u64,
}

impl Faulter {
    pub(crate) fn anonymous(len: u64) -> Self {
        Self::start(&format!("anonymous {len}"))
    }

    /// Starts a process that maps the memfd read-only, as a VMM does.
    pub(crate) fn private_of(memfd: &OwnedFd, len: u64) -> Self {
        let path = format!("/proc/{}/fd/{}", std::process::id(), memfd.as_raw_fd());
        Self::start(&format!("private {path} {len}"))
    }

    fn start(mapping: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_wrenn-faulter"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let mut faulter = Self {
            child,
            input,
            output,
            base: 0,
        };
        faulter.base = faulter.ask(mapping).parse().expect("an address");
        faulter
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn send(&mut self, command: &str) {
        writeln!(self.input, "{command}").expect("the process reads its input");
    }

    pub(crate) fn answer(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("reads");
        line.trim_end().to_owned()
    }

    pub(crate) fn ask(&mut self, command: &str) -> String {
        self.send(command);
        self.answer()
    }

    pub(crate) fn load(&mut self, offset: u64) -> u64 {
        self.ask(&format!("load {offset}")).parse().expect("a word")
    }

    pub(crate) fn checksum(&mut self, offset: u64, len: u64) -> u64 {
        let answer = self.ask(&format!("checksum {offset} {len}"));
        answer.parse().expect("a sum")
    }

    pub(crate) fn handshake(&mut self) -> Handshake {
        self.handshake_by("connect")
    }

    /// Like [`Faulter::handshake`], but the process does not report what it discards.
    pub(crate) fn quiet_handshake(&mut self) -> Handshake {
        self.handshake_by("connect-quietly")
    }

    fn handshake_by(&mut self, command: &str) -> Handshake {
        let directory = TempDir::new().expect("a directory");
        let path = directory.path().join("uffd.sock");
        let listener = UnixListener::bind(&path).expect("binds");
        self.send(&format!("{command} {}", path.display()));
        let never = never();
        let deadline = Instant::now() + DEADLINE;
        let handshake = handshake::accept(&listener, never.as_fd(), deadline).expect("accepts");
        assert_eq!(self.answer(), "ok");
        handshake
    }

    /// Starts a server for this process's memory.
    pub(crate) fn serve(
        &mut self,
        backing: Backing,
        source: &Arc<Pattern>,
        options: Options,
    ) -> PageServer {
        let handshake = self.handshake();
        let source = Arc::clone(source);
        PageServer::start(handshake, backing, source, options).expect("starts")
    }

    /// Returns the number of the process's threads that wait in the kernel function `name`.
    pub(crate) fn threads_in(&self, name: &str) -> usize {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("lives");
        let waits = |task: std::io::Result<std::fs::DirEntry>| {
            let path = task.expect("reads").path().join("wchan");
            std::fs::read_to_string(path).is_ok_and(|place| place.contains(name))
        };
        tasks.filter_map(|task| waits(task).then_some(())).count()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("kills");
        self.child.wait().expect("waits");
    }
}

impl Drop for Faulter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns a descriptor that never becomes readable.
pub(crate) fn never() -> OwnedFd {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("an eventfd")
}
