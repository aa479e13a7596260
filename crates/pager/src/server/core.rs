//! State shared by both threads of a server: the VM's memory, and the ways to load a page into it.

use std::{
    fmt, io,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use parking_lot::{Mutex, MutexGuard};
use rustix::{fs::SeekFrom, io::Errno};
use thiserror_ext::AsReport as _;
use wrenn_sys::{
    pinned::PinnedWriter,
    uffd::{Uffd, UffdError},
};

use super::{Backing, failure::Failed, gate::Gate, progress::Progress};
use crate::{
    PAGE_BYTES,
    page_set::PageSet,
    region::Regions,
    source::{Extent, MemorySource, SourceError},
};

pub(super) struct Core {
    pub(super) uffd: Uffd,
    pub(super) regions: Regions,
    pub(super) backing: Backing,
    pub(super) source: Arc<dyn MemorySource>,
    /// Pages that the VM discarded. A thread holds this lock while it reads events or installs
    /// prefetched pages, so that no page is installed based on a set that lacks an event already
    /// read.
    pub(super) removed: Mutex<PageSet>,
    pub(super) gate: Gate,
    pub(super) stop: OwnedFd,
    pub(super) stopping: AtomicBool,
    pub(super) progress: Arc<Progress>,
    pub(super) failed: Failed,
}

/// Reason why a thread of the server ends before it is stopped.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServeError {
    /// The process with the memory has exited; no thread waits for pages.
    #[error("the VMM process has exited")]
    Gone,
    #[error("failed to load the page at offset {offset}")]
    Source { offset: u64, source: SourceError },
    #[error("the source returned an invalid extent of {len} bytes at offset {offset}")]
    Extent { offset: u64, len: u64 },
    #[error("failed to write {len} bytes at offset {offset} of the shared memory")]
    Write {
        offset: u64,
        len: usize,
        source: io::Error,
    },
    #[error("failed to find holes in the shared memory")]
    Seek(#[source] io::Error),
    #[error("page fault at address {0:#x} outside of all regions")]
    Nowhere(u64),
    #[error("page fault at address {0:#x} is not for a missing page")]
    NotMissing(u64),
    #[error("unknown userfaultfd event")]
    UnknownEvent,
    #[error("failed to resolve page faults")]
    Uffd(#[source] UffdError),
    #[error("failed to wait for page faults")]
    Poll(#[source] io::Error),
    #[error("poll reported an error on the userfaultfd")]
    Closed,
}

impl From<UffdError> for ServeError {
    fn from(error: UffdError) -> Self {
        match error {
            UffdError::Gone => Self::Gone,
            other => Self::Uffd(other),
        }
    }
}

impl Core {
    pub(super) fn request_stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        // The eventfd's counter cannot overflow: the server writes only a few times.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn removed(&self) -> MutexGuard<'_, PageSet> {
        self.removed.lock()
    }

    /// Runs one thread of the server. If the thread ends early, the other thread ends too. Every
    /// cause is reported as a failure, except a dead VM.
    pub(super) fn run(&self, body: impl FnOnce() -> Result<(), ServeError>) {
        let guard = PanicGuard(self);
        let result = body();
        drop(guard);
        match result {
            Ok(()) => return,
            Err(ServeError::Gone) => self.progress.gone.store(true, Ordering::Relaxed),
            Err(error) => self.failed.set(error.to_report_string()),
        }
        self.request_stop();
    }

    /// Returns the extent that begins at `offset`, after checking the source's result.
    pub(super) fn extent(&self, offset: u64) -> Result<Extent, ServeError> {
        let extent = self
            .source
            .extent(offset)
            .map_err(|source| ServeError::Source { offset, source })?;
        if extent.len == 0 || !extent.len.is_multiple_of(PAGE_BYTES) {
            return Err(ServeError::Extent {
                offset,
                len: extent.len,
            });
        }
        Ok(extent)
    }

    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ServeError> {
        self.source
            .read_at(offset, buffer)
            .map_err(|source| ServeError::Source { offset, source })
    }
}

/// True if the shared memory contains the page at `offset`.
pub(super) fn has_page(memfd: &OwnedFd, offset: u64) -> Result<bool, ServeError> {
    let hole = rustix::fs::seek(memfd, SeekFrom::Hole(offset));
    Ok(hole.map_err(|error| ServeError::Seek(error.into()))? != offset)
}

/// Returns the first run of `start..end` that is missing in the shared memory, as (start, end).
pub(super) fn first_hole(
    memfd: &OwnedFd,
    start: u64,
    end: u64,
) -> Result<Option<(u64, u64)>, ServeError> {
    let seek_failed = |error: Errno| ServeError::Seek(error.into());
    let hole = rustix::fs::seek(memfd, SeekFrom::Hole(start)).map_err(seek_failed)?;
    if hole >= end {
        return Ok(None);
    }
    match rustix::fs::seek(memfd, SeekFrom::Data(hole)) {
        Ok(data) => Ok(Some((hole, data.min(end)))),
        // No data after the hole.
        Err(Errno::NXIO) => Ok(Some((hole, end))),
        Err(error) => Err(seek_failed(error)),
    }
}

/// Writes whole pages to the shared memory.
pub(super) fn fill(
    writer: &mut PinnedWriter,
    memfd: &OwnedFd,
    offset: u64,
    content: &[u8],
) -> Result<(), ServeError> {
    let len = content.len();
    writer
        .write_at(memfd.as_fd(), offset, content)
        .map_err(|source| ServeError::Write {
            offset,
            len,
            source,
        })
}

/// Reports a panic of the source as a failure, so that the VM does not wait forever.
struct PanicGuard<'a>(&'a Core);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0
                .failed
                .set("a page server thread panicked".to_owned());
            self.0.request_stop();
        }
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("regions", &self.regions)
            .field("backing", &self.backing)
            .finish_non_exhaustive()
    }
}
