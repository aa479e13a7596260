//! The page server of one machine: a thread that answers faults, and one that loads ahead.
//!
//! Owns the userfaultfd, its copy of the shared memory's descriptor, and two threads with small stacks; [`PageServer::stop`]
//! and drop end and free all of them, however many faults are waiting. It never starts or kills a machine.
//!
//! ```text
//! fault ─ read events ─ REMOVE: the range is zero from now on
//!                     └ MISSING ─ zero   ─ UFFDIO_ZEROPAGE over the run of zeros around it
//!                               ├ shared ─ already in the memfd: wake; else read, write to the memfd, wake
//!                               └ private ─ read, UFFDIO_COPY
//! ```
//!
//! What fails: a source that cannot be read, or the kernel. Then faults are no longer answered (zeros would be a lie) and
//! [`PageServer::failed`] says why. The owner kills the machine and then stops the server: as long as anyone holds the
//! userfaultfd the machine's threads wait; when the last copy closes they would go on with zeros.
//!
//! A range that the machine gives back reads as zeros afterwards in private memory. In shared memory that is so for pages that
//! nobody has loaded; a loaded one reads as in the snapshot again, so a machine on shared memory must not count on zeros.
//!
//! Shared memory is written by system calls, from pinned pages, under each page's lock: no other machine sees half a page.

mod core;
mod demand;
mod failure;
mod gate;
mod prefetch;
mod progress;

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, atomic::AtomicBool},
    thread::{Builder, JoinHandle},
};

use rustix::event::EventfdFlags;

use self::{core::Core, gate::Gate, progress::Progress};
use crate::{handshake::Handshake, page_set::PageSet, run::PageRun, source::MemorySource};

pub use self::{failure::Failed, progress::Stats};

/// Stack of each of the two threads, bytes. Only what is used takes memory.
const STACK_BYTES: usize = 256 * 1024;

/// What lies behind the machine's mapping.
#[derive(Debug)]
pub enum Backing {
    /// A memfd that all machines of a snapshot map privately. This descriptor is writable.
    Shared(OwnedFd),
    /// Anonymous memory of this machine.
    Private,
}

/// How to serve.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// What to load ahead, in this order. Runs beyond the memory are left out.
    pub prefetch: Vec<PageRun>,
    /// How many first faults to remember at most; 0 for none.
    pub record_limit: usize,
}

/// Why a server did not start. The machine is still waiting, and must be killed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The machine has more memory than the snapshot.
    #[error("the machine's memory ends at {memory} bytes, the snapshot at {source_len}")]
    SourceTooSmall {
        /// End of the last region, bytes.
        memory: u64,
        /// Size of the source, bytes.
        source_len: u64,
    },
    /// The machine has more memory than the shared copy.
    #[error("the machine's memory ends at {memory} bytes, the shared memory at {shared}")]
    SharedTooSmall {
        /// End of the last region, bytes.
        memory: u64,
        /// Size of the memfd, bytes.
        shared: u64,
    },
    /// A system call failed.
    #[error("{call} failed")]
    Io {
        /// Which.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Serves the faults of one machine until it is stopped or dropped.
#[derive(Debug)]
pub struct PageServer {
    core: Option<Arc<Core>>,
    threads: Vec<JoinHandle<()>>,
    progress: Arc<Progress>,
    failed: Failed,
}

impl PageServer {
    /// Starts to answer.
    ///
    /// # Errors
    /// [`StartError`]; the handshake's descriptor is closed then.
    pub fn start(
        handshake: Handshake,
        backing: Backing,
        source: Arc<dyn MemorySource>,
        options: Options,
    ) -> Result<Self, StartError> {
        let Handshake { regions, uffd } = handshake;
        let memory = regions.end_offset();
        check_sizes(memory, source.len(), &backing)?;
        // A userfaultfd that blocks cannot be polled.
        rustix::io::ioctl_fionbio(&uffd, true).map_err(failed_call("fcntl"))?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let stop = rustix::event::eventfd(0, flags).map_err(failed_call("eventfd"))?;
        let failed = Failed::new().map_err(failed_call("eventfd"))?;
        let progress = Arc::new(Progress::new(options.record_limit, memory));
        let core = Arc::new(Core {
            uffd,
            regions,
            backing,
            source,
            removed: Mutex::new(PageSet::new(memory)),
            gate: Gate::default(),
            stop,
            stopping: AtomicBool::new(false),
            progress: Arc::clone(&progress),
            failed: failed.clone(),
        });
        // From here on, drop ends what has begun.
        let mut server = Self {
            core: Some(Arc::clone(&core)),
            threads: Vec::with_capacity(2),
            progress,
            failed,
        };
        let faults = demand::prepare(Arc::clone(&core)).map_err(failed_call("mmap"))?;
        server.spawn("page-faults", faults)?;
        if !options.prefetch.is_empty() {
            let ahead = prefetch::prepare(core, options.prefetch).map_err(failed_call("mmap"))?;
            server.spawn("page-prefetch", ahead)?;
        }
        Ok(server)
    }

    fn spawn(
        &mut self,
        name: &str,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), StartError> {
        let thread = Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(body)
            .map_err(failed_call("clone"))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Fires when the server can no longer answer: the owner must kill the machine.
    #[must_use]
    pub fn failed(&self) -> Failed {
        self.failed.clone()
    }

    /// What was done so far. Still there after [`PageServer::stop`].
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.progress.stats()
    }

    /// Offsets of pages in the order of their first fault, each once, at most as many as [`Options::record_limit`].
    ///
    /// A page that was loaded ahead has no fault: the next prefetch list is the last one and this.
    #[must_use]
    pub fn recorded(&self) -> Vec<u64> {
        self.progress.recorded()
    }

    /// Ends both threads and closes every descriptor. The machine must be dead. Doing it twice is fine.
    ///
    /// Waits for the read that is under way, if there is one.
    pub fn stop(&mut self) {
        if let Some(core) = self.core.take() {
            core.request_stop();
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has reported it by `failed`.
            let _ = thread.join();
        }
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn failed_call<E: Into<io::Error>>(call: &'static str) -> impl FnOnce(E) -> StartError {
    move |error| StartError::Io {
        call,
        source: error.into(),
    }
}

fn check_sizes(memory: u64, source_len: u64, backing: &Backing) -> Result<(), StartError> {
    if memory > source_len {
        return Err(StartError::SourceTooSmall { memory, source_len });
    }
    if let Backing::Shared(memfd) = backing {
        let stat = rustix::fs::fstat(memfd).map_err(failed_call("fstat"))?;
        let shared = u64::try_from(stat.st_size).unwrap_or(0);
        if memory > shared {
            return Err(StartError::SharedTooSmall { memory, shared });
        }
    }
    Ok(())
}
