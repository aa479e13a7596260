//! Prefetch: loads runs of pages before they fault.
//!
//! Shared memory is filled only by writing to the memfd, and only where the memfd has holes; the VM
//! finds the pages there. Anonymous memory is filled by UFFDIO_COPY, except for pages that the VM
//! discarded. Faults take precedence between two pieces.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use wrenn_sys::{mapping::PageBuffer, pinned::PinnedWriter, uffd::UffdError};

use super::{
    Backing,
    core::{Core, ServeError, fill, first_hole},
};
use crate::{PAGE_BYTES, run::PageRun};

/// Maximum number of pages loaded at once.
const PIECE_PAGES: usize = 32;

/// Returns the body of the thread, with everything allocated.
pub(super) fn prepare(
    core: Arc<Core>,
    runs: Vec<PageRun>,
) -> io::Result<impl FnOnce() + Send + 'static> {
    let mut prefetch = Prefetch {
        buffer: PageBuffer::new(PIECE_PAGES)?,
        writer: PinnedWriter::new(PIECE_PAGES)?,
        core: Arc::clone(&core),
    };
    Ok(move || {
        core.run(|| {
            let begun = Instant::now();
            let result = prefetch.load(&runs);
            core.progress.add_prefetch_time(begun.elapsed());
            result
        });
    })
}

struct Prefetch {
    core: Arc<Core>,
    buffer: PageBuffer,
    writer: PinnedWriter,
}

impl Prefetch {
    fn load(&mut self, runs: &[PageRun]) -> Result<(), ServeError> {
        let memory = self.core.regions.end_offset();
        for run in runs {
            let mut position = run.offset / PAGE_BYTES * PAGE_BYTES;
            let end = run.end().min(memory).next_multiple_of(PAGE_BYTES);
            while position < end {
                self.core.gate.pass(&self.core.stopping);
                if self.core.is_stopping() {
                    return Ok(());
                }
                position += self.piece(position, end - position)?;
            }
        }
        self.core.progress.prefetch_done.store(true, Relaxed);
        Ok(())
    }

    /// Loads one piece of at most `limit` bytes from `offset`. Returns the number of bytes done.
    fn piece(&mut self, offset: u64, limit: u64) -> Result<u64, ServeError> {
        let Some(region) = self.core.regions.at_offset(offset) else {
            return Ok(PAGE_BYTES);
        };
        let address = region.address + (offset - region.offset);
        let limit = limit.min(region.offset + region.len - offset);
        let extent = self.core.extent(offset)?;
        let piece = limit.min(extent.len).min(self.buffer.len() as u64);
        let core = Arc::clone(&self.core);
        match (&core.backing, extent.zero) {
            (Backing::Shared(_), true) => Ok(limit.min(extent.len)),
            (Backing::Shared(memfd), false) => {
                self.fill_holes(memfd, offset, offset + piece)?;
                Ok(piece)
            }
            (Backing::Private, true) => {
                self.install(offset, piece, |at, len| core.uffd.zero(address + at, len))?;
                Ok(piece)
            }
            (Backing::Private, false) => {
                self.core
                    .read(offset, part_mut(&mut self.buffer, 0, piece))?;
                let buffer = &self.buffer;
                self.install(offset, piece, |at, len| {
                    core.uffd.copy(address + at, part(buffer, at, len))
                })?;
                Ok(piece)
            }
        }
    }

    fn fill_holes(&mut self, memfd: &OwnedFd, start: u64, end: u64) -> Result<(), ServeError> {
        let mut position = start;
        while let Some((hole, hole_end)) = first_hole(memfd, position, end)? {
            let content = part_mut(&mut self.buffer, 0, hole_end - hole);
            self.core.read(hole, content)?;
            fill(&mut self.writer, memfd, hole, content)?;
            self.loaded(hole_end - hole);
            if hole_end >= end {
                break;
            }
            position = hole_end;
        }
        Ok(())
    }

    /// Installs `len` bytes from `offset` by `put(at, len)`, except for existing and discarded
    /// pages.
    fn install(
        &self,
        offset: u64,
        len: u64,
        put: impl Fn(u64, u64) -> Result<(), UffdError>,
    ) -> Result<(), ServeError> {
        let mut at = 0;
        while at < len && !self.core.is_stopping() {
            self.core.gate.pass(&self.core.stopping);
            let removed = self.core.removed();
            at += removed.run(offset + at, len - at, true);
            let run = removed.run(offset + at, len - at, false);
            if run == 0 {
                continue;
            }
            match put(at, run) {
                Ok(()) => {
                    at += run;
                    self.loaded(run);
                }
                Err(UffdError::Exists) => at += PAGE_BYTES,
                Err(UffdError::Again { done: 0 }) => {
                    // The address space is changing until the other thread has read the event.
                    drop(removed);
                    self.core.gate.pause();
                }
                Err(UffdError::Again { done }) => {
                    at += done;
                    self.loaded(done);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn loaded(&self, bytes: u64) {
        let pages = &self.core.progress.pages_prefetched;
        pages.fetch_add(bytes / PAGE_BYTES, Relaxed);
    }
}

fn part(buffer: &[u8], at: u64, len: u64) -> &[u8] {
    let range = range(at, len);
    buffer.get(range).unwrap_or_default()
}

fn part_mut(buffer: &mut [u8], at: u64, len: u64) -> &mut [u8] {
    let range = range(at, len);
    buffer.get_mut(range).unwrap_or_default()
}

fn range(at: u64, len: u64) -> std::ops::Range<usize> {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    at..at.saturating_add(usize::try_from(len).unwrap_or(usize::MAX))
}
