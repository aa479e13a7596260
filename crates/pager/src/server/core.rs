//! What both threads of a server share: the machine's memory, and how a page gets there.

use std::{
    fmt, io,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use rustix::{fs::SeekFrom, io::Errno};
use wrenn_sys::{
    pinned::PinnedWriter,
    uffd::{Uffd, UffdError},
};

use super::{Backing, failure, failure::Failed, gate::Gate, progress::Progress};
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
    /// Pages that the machine gave back. Whoever reads events or installs pages ahead holds this lock, so that no page is
    /// installed on the strength of a set that lacks an event already read.
    pub(super) removed: Mutex<PageSet>,
    pub(super) gate: Gate,
    pub(super) stop: OwnedFd,
    pub(super) stopping: AtomicBool,
    pub(super) progress: Arc<Progress>,
    pub(super) failed: Failed,
}

/// Why a thread of the server ends before it is told to.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServeError {
    /// The process with the memory is gone; nobody waits for anything.
    #[error("the process is gone")]
    Gone,
    #[error("no content for the page at offset {offset}")]
    Source { offset: u64, source: SourceError },
    #[error("the source says that {len} bytes begin at offset {offset}")]
    Extent { offset: u64, len: u64 },
    #[error("cannot write {len} bytes at offset {offset} of the shared memory")]
    Write {
        offset: u64,
        len: usize,
        source: io::Error,
    },
    #[error("cannot look into the shared memory")]
    Look(#[source] io::Error),
    #[error("a fault at address {0:#x}, which belongs to no region")]
    Nowhere(u64),
    #[error("a fault at address {0:#x} that is not of a missing page")]
    NotMissing(u64),
    #[error("an event that is not known")]
    UnknownEvent,
    #[error("page faults cannot be answered")]
    Uffd(#[source] UffdError),
    #[error("cannot wait for page faults")]
    Poll(#[source] io::Error),
    #[error("the userfaultfd is in error")]
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
        // Cannot be full: at most a few ones are written.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn removed(&self) -> MutexGuard<'_, PageSet> {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one thread of the server: whatever ends it early ends the other one too, and all but a dead machine is told.
    pub(super) fn run(&self, body: impl FnOnce() -> Result<(), ServeError>) {
        let guard = PanicGuard(self);
        let result = body();
        drop(guard);
        match result {
            Ok(()) => return,
            Err(ServeError::Gone) => self.progress.gone.store(true, Ordering::Relaxed),
            Err(error) => self.failed.set(failure::with_causes(&error)),
        }
        self.request_stop();
    }

    /// What begins at `offset`, as the source says it.
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

/// Whether the shared memory has the page at `offset`.
pub(super) fn has_page(memfd: &OwnedFd, offset: u64) -> Result<bool, ServeError> {
    let hole = rustix::fs::seek(memfd, SeekFrom::Hole(offset));
    Ok(hole.map_err(|error| ServeError::Look(error.into()))? != offset)
}

/// The first run of `start..end` that the shared memory does not have yet, as (start, end).
pub(super) fn first_hole(
    memfd: &OwnedFd,
    start: u64,
    end: u64,
) -> Result<Option<(u64, u64)>, ServeError> {
    let look = |error: Errno| ServeError::Look(error.into());
    let hole = rustix::fs::seek(memfd, SeekFrom::Hole(start)).map_err(look)?;
    if hole >= end {
        return Ok(None);
    }
    match rustix::fs::seek(memfd, SeekFrom::Data(hole)) {
        Ok(data) => Ok(Some((hole, data.min(end)))),
        // No data behind the hole.
        Err(Errno::NXIO) => Ok(Some((hole, end))),
        Err(error) => Err(look(error)),
    }
}

/// Puts whole pages into the shared memory.
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

/// A panic of a source must not leave the machine waiting forever.
struct PanicGuard<'a>(&'a Core);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0
                .failed
                .set("a thread of the page server panicked".to_owned());
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
