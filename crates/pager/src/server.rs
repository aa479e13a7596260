//! Page server of one VM: one thread that resolves faults, and one thread that prefetches pages.
//!
//! Owns the userfaultfd, a duplicate of the shared memory's descriptor, and two threads with small
//! stacks. [`PageServer::stop`] and drop end the threads and free these resources, however many
//! faults are waiting. The server never starts or kills a VM.
//!
//! ```text
//! fault ─ read events ─ REMOVE: the range is zero from now on
//!                     └ MISSING ─ zero    ─ UFFDIO_ZEROPAGE over the run of zeros around the page
//!                               ├ shared  ─ present in the memfd: wake; else read, write, wake
//!                               └ private ─ read, UFFDIO_COPY
//! ```
//!
//! Failures: the source cannot be read, or the kernel reports an error. The server then no longer
//! resolves faults (zeros would be wrong content), and [`PageServer::failed`] reports the reason.
//! The owner kills the VM and then stops the server. As long as any process holds the userfaultfd,
//! the VM's threads wait. When the last copy closes, they would continue with zeros.
//!
//! A range of private memory that the VM discards reads as zeros afterwards. In shared memory, this
//! holds only for pages that no VM has loaded. A loaded page reads as in the snapshot again, so a
//! VM on shared memory must not rely on zeros, unless it maps the zero page itself. The library in
//! QEMU does that, and reports nothing (`wrenn-preload`).
//!
//! Shared memory is written by system calls, from pinned pages, under each page's lock: no other VM
//! sees a partly written page.

mod core;
mod demand;
mod failure;
mod gate;
mod prefetch;
mod progress;

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, atomic::AtomicBool},
    thread::{Builder, JoinHandle},
};

use parking_lot::Mutex;
use rustix::event::EventfdFlags;

use self::{core::Core, gate::Gate, progress::Progress};
use crate::{handshake::Handshake, page_set::PageSet, run::PageRun, source::MemorySource};

pub use self::{failure::Failed, progress::Stats};

/// Stack size of each of the two threads, in bytes. Only used pages of a stack take memory.
const STACK_BYTES: usize = 256 * 1024;

/// Memory behind the VM's mapping.
#[derive(Debug)]
pub enum Backing {
    /// A memfd that all VMs of a snapshot map privately. This descriptor is writable.
    Shared(OwnedFd),
    /// Anonymous memory of this VM.
    Private,
}

/// Options of a page server.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Runs to prefetch, in this order. Runs beyond the memory are ignored.
    pub prefetch: Vec<PageRun>,
    /// Maximum number of first faults to record; 0 for none.
    pub record_limit: usize,
}

/// Reason why a server did not start. The VM is still waiting and must be killed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Guest memory is larger than the snapshot.
    #[error("guest memory ends at {memory} bytes, the snapshot at {source_len}")]
    SourceTooSmall {
        /// End of the last region, in bytes.
        memory: u64,
        /// Size of the source, in bytes.
        source_len: u64,
    },
    /// Guest memory is larger than the shared memory.
    #[error("guest memory ends at {memory} bytes, the shared memory at {shared}")]
    SharedTooSmall {
        /// End of the last region, in bytes.
        memory: u64,
        /// Size of the memfd, in bytes.
        shared: u64,
    },
    /// A system call failed.
    #[error("{call} failed")]
    Io {
        /// Name of the system call.
        call: &'static str,
        /// Error returned by the kernel.
        source: io::Error,
    },
}

/// Resolves the faults of one VM until it is stopped or dropped.
#[derive(Debug)]
pub struct PageServer {
    core: Option<Arc<Core>>,
    threads: Vec<JoinHandle<()>>,
    progress: Arc<Progress>,
    failed: Failed,
}

impl PageServer {
    /// Starts to resolve faults.
    ///
    /// # Errors
    /// [`StartError`]; the handshake's descriptor is closed on failure.
    pub fn start(
        handshake: Handshake,
        backing: Backing,
        source: Arc<dyn MemorySource>,
        options: Options,
    ) -> Result<Self, StartError> {
        let Handshake { regions, uffd } = handshake;
        let memory = regions.end_offset();
        check_sizes(memory, source.len(), &backing)?;
        // A blocking userfaultfd cannot be polled.
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
        // From here on, dropping `server` ends everything that was started.
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

    /// Returns the failure notification. When it fires, the server no longer resolves faults, and
    /// the owner must kill the VM.
    #[must_use]
    pub fn failed(&self) -> Failed {
        self.failed.clone()
    }

    /// Returns the counters so far. Available after [`PageServer::stop`] as well.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.progress.stats()
    }

    /// Returns the offsets of pages in the order of their first fault, each page once, at most
    /// [`Options::record_limit`].
    ///
    /// A prefetched page causes no fault, so the next prefetch list is the previous list plus these
    /// pages.
    #[must_use]
    pub fn recorded(&self) -> Vec<u64> {
        self.progress.recorded()
    }

    /// Ends both threads and closes every descriptor. The VM must be dead. A second call has no
    /// effect.
    ///
    /// Waits for a read of the source that is in progress.
    pub fn stop(&mut self) {
        if let Some(core) = self.core.take() {
            core.request_stop();
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has reported the panic through `failed`.
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
