//! Pages that a VM changed: the anonymous pages of its memory, and their content.
//!
//! The VM must be stopped, and the VMM must be an unreaped child process, so that its process id
//! cannot be reused. Where memory is mapped from a shared memfd, a page that was only loaded is not
//! dirty. Where pages were installed by copying (Firecracker), every loaded page is dirty, and the
//! caller compares the pages with the parent snapshot. This module changes nothing in the VMM.

use std::io;

use wrenn_sys::pagemap::{AddressRange, MAX_RANGES, PageMap, read_process};

use crate::{PAGE_BYTES, run::PageRun};

/// Maximum number of bytes per read.
pub const BATCH_BYTES: u64 = 256 * 1024;

/// Reason why changed pages cannot be found or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyError {
    /// The page map of the process cannot be read.
    #[error("failed to read the page map of process {pid}")]
    PageMap {
        /// Process id.
        pid: u32,
        /// Error returned by the kernel.
        source: io::Error,
    },
    /// The memory of the process cannot be read.
    #[error("failed to read {len} bytes at offset {offset} of the memory of process {pid}")]
    Memory {
        /// Process id.
        pid: u32,
        /// Offset from the start of the mapping, in bytes.
        offset: u64,
        /// Requested length, in bytes.
        len: u64,
        /// Error returned by the kernel.
        source: io::Error,
    },
    /// A run lies beyond the address space, or does not consist of whole pages.
    #[error("invalid page run of {len} bytes at offset {offset}")]
    Run {
        /// Offset of the run, in bytes.
        offset: u64,
        /// Length of the run, in bytes.
        len: u64,
    },
}

/// Returns the changed pages among the `len` bytes that process `pid` has mapped at `base`, in
/// order. Offsets are relative to `base`.
///
/// # Errors
/// [`DirtyError::PageMap`]
pub fn scan(pid: u32, base: u64, len: u64) -> Result<Vec<PageRun>, DirtyError> {
    scan_by(pid, base, |map| map.dirty(base, len))
}

/// Returns the pages among the `len` bytes that process `pid` has mapped at `base` that are mapped
/// to the kernel's zero page, in order. Offsets are relative to `base`.
///
/// In memory that is mapped from a shared memfd, these are pages that are zeros in the snapshot,
/// and pages that the VM gave back. A page that was not touched is not among them.
///
/// # Errors
/// [`DirtyError::PageMap`]
pub fn zeros(pid: u32, base: u64, len: u64) -> Result<Vec<PageRun>, DirtyError> {
    scan_by(pid, base, |map| map.zeros(base, len))
}

/// Returns the runs of `0..len` that `runs` leave out. `runs` are in order and do not overlap.
#[must_use]
pub fn gaps(runs: &[PageRun], len: u64) -> Vec<PageRun> {
    let mut gaps = Vec::with_capacity(runs.len() + 1);
    let mut end = 0;
    let last = PageRun {
        offset: len,
        len: 0,
    };
    for run in runs.iter().chain([&last]) {
        if run.offset > end {
            gaps.push(PageRun {
                offset: end,
                len: run.offset - end,
            });
        }
        end = run.end();
    }
    gaps
}

/// Like [`scan`], but reads the page map's entries instead of sending the request of Linux 6.7.
///
/// # Errors
/// [`DirtyError::PageMap`]
pub fn scan_entries(pid: u32, base: u64, len: u64) -> Result<Vec<PageRun>, DirtyError> {
    scan_by(pid, base, |map| map.dirty_by_entries(base, len))
}

fn scan_by(
    pid: u32,
    base: u64,
    scan: impl FnOnce(&PageMap) -> io::Result<Vec<AddressRange>>,
) -> Result<Vec<PageRun>, DirtyError> {
    let map_error = |source| DirtyError::PageMap { pid, source };
    let ranges = PageMap::open(pid)
        .and_then(|map| scan(&map))
        .map_err(map_error)?;
    let run = |range: &AddressRange| PageRun {
        offset: range.start - base,
        len: range.len,
    };
    Ok(ranges.iter().map(run).collect())
}

/// Reads `runs` of the memory that process `pid` has mapped at `base`, in batches.
///
/// Passes every piece to `take` with its offset, in the order of the runs. A long run is passed in
/// several pieces.
///
/// # Errors
/// [`DirtyError`], or the error returned by `take`; nothing is read after an error.
pub fn read_runs<E: From<DirtyError>>(
    pid: u32,
    base: u64,
    runs: &[PageRun],
    mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; usize::try_from(BATCH_BYTES).unwrap_or(0)];
    let mut batch = Batch {
        ranges: Vec::with_capacity(MAX_RANGES),
        bytes: 0,
    };
    for run in runs {
        let possible = base
            .checked_add(run.offset)
            .and_then(|at| at.checked_add(run.len));
        if possible.is_none() || !run.len.is_multiple_of(PAGE_BYTES) {
            return Err(E::from(DirtyError::Run {
                offset: run.offset,
                len: run.len,
            }));
        }
        let mut done = 0;
        while done < run.len {
            let len = (run.len - done).min(BATCH_BYTES - batch.bytes);
            batch.ranges.push(AddressRange {
                start: base + run.offset + done,
                len,
            });
            batch.bytes += len;
            done += len;
            if batch.bytes == BATCH_BYTES || batch.ranges.len() == MAX_RANGES {
                batch.read(pid, base, &mut buffer, &mut take)?;
            }
        }
    }
    batch.read(pid, base, &mut buffer, &mut take)
}

struct Batch {
    ranges: Vec<AddressRange>,
    bytes: u64,
}

impl Batch {
    fn read<E: From<DirtyError>>(
        &mut self,
        pid: u32,
        base: u64,
        buffer: &mut [u8],
        take: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(first) = self.ranges.first() else {
            return Ok(());
        };
        let bytes = usize::try_from(self.bytes).unwrap_or(0);
        let mut rest = buffer.get_mut(..bytes).unwrap_or_default();
        read_process(pid, &self.ranges, rest).map_err(|source| DirtyError::Memory {
            pid,
            offset: first.start - base,
            len: self.bytes,
            source,
        })?;
        for range in &self.ranges {
            let len = usize::try_from(range.len).unwrap_or(0);
            let (piece, behind) = std::mem::take(&mut rest).split_at_mut(len);
            take(range.start - base, piece)?;
            rest = behind;
        }
        self.ranges.clear();
        self.bytes = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun {
            offset: first * PAGE_BYTES,
            len: pages * PAGE_BYTES,
        }
    }

    #[test]
    fn gaps_and_runs_are_all_of_the_memory() {
        let len = 10 * PAGE_BYTES;
        assert_eq!(gaps(&[], len), [run(0, 10)]);
        assert_eq!(gaps(&[run(0, 10)], len), []);
        assert_eq!(gaps(&[run(0, 2), run(5, 1)], len), [run(2, 3), run(6, 4)]);
        let adjacent = [run(1, 2), run(3, 1), run(9, 1)];
        assert_eq!(gaps(&adjacent, len), [run(0, 1), run(4, 5)]);
        assert_eq!(gaps(&[], 0), []);
    }
}
