//! Benchmark of the page server against a minimal handler, in one run; prints JSON.
//!
//! Demand faults: 1 and 2 threads touch every page once. The faults are resolved by a
//! [`PageServer`], and by a loop of poll, read of one event, read of the page, and copy. Prefetch:
//! the same memory is prefetched, and loaded by a bare loop of 64 KiB reads and copies. `shared`
//! fills a memfd by pwrite, `private` uses UFFDIO_COPY. The content is a file in memory. Each
//! figure is the median of the rounds, in which the two sides alternate. The scheduler's placement
//! of the threads matters more than anything else: run with `taskset -c 0` to measure the cost of
//! the handlers themselves.
//!
//! `cargo run --release -p wrenn-pager --example faults [PAGES] [ROUNDS]`

use std::{
    error::Error,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::MemfdFlags,
};
use serde_json::{Value, json};
use wrenn_pager::{
    Backing, Extent, Handshake, MemorySource, Options, PageRun, PageServer, Region, Regions,
    SourceError,
};
use wrenn_sys::{
    mapping::{Mapping, PageBuffer},
    uffd::{Event, Features, Uffd},
};

const PAGE: usize = 4096;
const BARE_PAGES: usize = 16;

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse());
    let pages = arguments.next().transpose()?.unwrap_or(16_384_usize);
    let rounds = arguments.next().transpose()?.unwrap_or(5_usize);
    let source = Arc::new(FileSource::new(pages)?);
    let mut results = Vec::new();
    for shared in [false, true] {
        let backing = if shared { "shared" } else { "private" };
        for threads in [1, 2] {
            let bench = |served: bool| demand(&source, shared, threads, served);
            let figure = compare(rounds, pages, bench)?;
            results.push(json!({"what": "demand", "backing": backing, "threads": threads, "pages_per_second": figure}));
        }
        let figure = compare(rounds, pages, |served| prefetch(&source, shared, served))?;
        results.push(json!({"what": "prefetch", "backing": backing, "pages_per_second": figure}));
    }
    let report = json!({"pages": pages, "rounds": rounds, "results": results});
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}

/// Measures both sides alternately and returns their medians.
fn compare(
    rounds: usize,
    pages: usize,
    bench: impl Fn(bool) -> Result<Duration, Failure>,
) -> Result<Value, Failure> {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..rounds.max(1) {
        for (served, times) in times.iter_mut().enumerate() {
            times.push(bench(served == 1)?);
        }
    }
    let mut rates = [0.0; 2];
    for (rate, times) in rates.iter_mut().zip(&mut times) {
        times.sort();
        let median = times.get(times.len() / 2).ok_or("no rounds")?;
        *rate = u32::try_from(pages).map(f64::from)? / median.as_secs_f64();
    }
    let [bare, served] = rates;
    Ok(
        json!({"least": bare.round(), "server": served.round(), "ratio": (served / bare * 1000.0).round() / 1000.0}),
    )
}

/// Content in a memfd, read by `pread`.
struct FileSource {
    file: OwnedFd,
    len: u64,
}

impl FileSource {
    fn new(pages: usize) -> Result<Self, Failure> {
        let file = rustix::fs::memfd_create("source", MemfdFlags::CLOEXEC)?;
        for page in 0..pages {
            let content = [u8::try_from(page % 255 + 1)?; PAGE];
            rustix::io::pwrite(&file, &content, (page * PAGE) as u64)?;
        }
        let len = (pages * PAGE) as u64;
        Ok(Self { file, len })
    }
}

impl MemorySource for FileSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        let len = self.len - offset;
        Ok(Extent { zero: false, len })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let wanted = buf.len();
        match rustix::io::pread(&self.file, buf, offset) {
            Ok(read) if read == wanted => Ok(()),
            other => Err(SourceError::Other {
                offset,
                source: format!("{other:?}").into(),
            }),
        }
    }
}

/// Memory of one VM, and the userfaultfd that reports its faults.
struct Machine {
    memory: Mapping,
    memfd: Option<OwnedFd>,
    uffd: Uffd,
}

impl Machine {
    fn new(len: u64, shared: bool) -> Result<Self, Failure> {
        let size = usize::try_from(len)?;
        let memfd = if shared {
            let memfd = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC)?;
            rustix::fs::ftruncate(&memfd, len)?;
            Some(memfd)
        } else {
            None
        };
        let memory = match &memfd {
            Some(memfd) => Mapping::private_of(memfd.as_fd(), size)?,
            None => Mapping::anonymous(size)?,
        };
        let uffd = Uffd::open()?;
        uffd.handshake(Features::MISSING_SHMEM, Features::NONE)?;
        uffd.register_missing(memory.address(), len)?;
        Ok(Self {
            memory,
            memfd,
            uffd,
        })
    }

    fn serve(&self, source: &Arc<FileSource>, options: Options) -> Result<PageServer, Failure> {
        let region = Region {
            address: self.memory.address(),
            len: source.len,
            offset: 0,
        };
        let handshake = Handshake {
            regions: Regions::new(&[region])?,
            uffd: Uffd::from_received(self.uffd.as_fd().try_clone_to_owned()?),
        };
        let backing = match &self.memfd {
            Some(memfd) => Backing::Shared(memfd.try_clone()?),
            None => Backing::Private,
        };
        let source: Arc<dyn MemorySource> = Arc::<FileSource>::clone(source);
        Ok(PageServer::start(handshake, backing, source, options)?)
    }

    /// Touches every page once, from several threads.
    fn touch(&self, threads: usize) -> Duration {
        let begun = Instant::now();
        thread::scope(|scope| {
            for first in 0..threads {
                scope.spawn(move || {
                    for offset in (first * PAGE..self.memory.len()).step_by(threads * PAGE) {
                        assert_ne!(self.memory.load(offset), Some(0), "a page without content");
                    }
                });
            }
        });
        begun.elapsed()
    }

    fn put(&self, offset: u64, content: &[u8]) -> Result<(), Failure> {
        match &self.memfd {
            Some(memfd) => {
                rustix::io::pwrite(memfd, content, offset)?;
            }
            None => self.uffd.copy(self.memory.address() + offset, content)?,
        }
        Ok(())
    }

    /// Minimal handler: poll, read one event, read the page, copy.
    fn least(&self, source: &FileSource, stop: &AtomicBool) -> Result<(), Failure> {
        let mut page = PageBuffer::new(1)?;
        let mut events = Vec::new();
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: 20_000_000,
        };
        while !stop.load(Ordering::Relaxed) {
            let mut fds = [PollFd::new(&self.uffd, PollFlags::IN)];
            rustix::event::poll(&mut fds, Some(&timeout))?;
            events.clear();
            self.uffd.read_events(&mut events)?;
            for event in &events {
                if let Event::Fault { address, .. } = event {
                    let address = address / 4096 * 4096;
                    let offset = address - self.memory.address();
                    source.read_at(offset, &mut page)?;
                    self.put(offset, &page)?;
                    if self.memfd.is_some() {
                        self.uffd.wake(address, 4096)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn demand(
    source: &Arc<FileSource>,
    shared: bool,
    threads: usize,
    served: bool,
) -> Result<Duration, Failure> {
    let machine = Machine::new(source.len, shared)?;
    if served {
        let options = Options {
            prefetch: Vec::new(),
            record_limit: 100_000,
        };
        let server = machine.serve(source, options)?;
        let time = machine.touch(threads);
        assert!(server.failed().reason().is_none());
        return Ok(time);
    }
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let handler = scope.spawn(|| machine.least(source, &stop));
        let time = machine.touch(threads);
        stop.store(true, Ordering::Relaxed);
        handler.join().map_err(|_| "the handler panicked")??;
        Ok(time)
    })
}

fn prefetch(source: &Arc<FileSource>, shared: bool, served: bool) -> Result<Duration, Failure> {
    let machine = Machine::new(source.len, shared)?;
    if served {
        let run = PageRun {
            offset: 0,
            len: source.len,
        };
        let options = Options {
            prefetch: vec![run],
            record_limit: 0,
        };
        let server = machine.serve(source, options)?;
        while !server.stats().prefetch_done {
            assert!(server.failed().reason().is_none());
            thread::sleep(Duration::from_millis(1));
        }
        return Ok(server.stats().prefetch_time);
    }
    let mut buffer = PageBuffer::new(BARE_PAGES)?;
    let begun = Instant::now();
    for offset in (0..source.len).step_by(BARE_PAGES * PAGE) {
        source.read_at(offset, &mut buffer)?;
        machine.put(offset, &buffer)?;
    }
    Ok(begun.elapsed())
}
