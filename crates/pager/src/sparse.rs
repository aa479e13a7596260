//! Pages that a VMM wrote to a file: the data of the file, and its content.
//!
//! The counterpart of [`dirty`](crate::dirty), for a VMM that writes the pages that its VM changed
//! to a sparse file (Firecracker). Data of the file is a page that changed, even if it is zero. A
//! hole is a page that did not change.
//!
//! The VMM may change the file while it is read. A file that becomes too short is an error.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use rustix::fs::{SeekFrom, seek};

use crate::{PAGE_BYTES, dirty::BATCH_BYTES, run::PageRun};

/// Reason why changed pages cannot be found or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SparseError {
    /// The file does not have the size of guest memory.
    #[error("the saved memory is {got} bytes long, expected {expected}")]
    Size {
        /// Size of the file, in bytes.
        got: u64,
        /// Size of guest memory, in bytes.
        expected: u64,
    },
    /// The data of the file cannot be found.
    #[error("failed to find the data of the saved memory after offset {offset}")]
    Scan {
        /// Offset in guest memory, in bytes.
        offset: u64,
        /// Error returned by the kernel.
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("failed to read {len} bytes at offset {offset} of the saved memory")]
    Read {
        /// Offset in guest memory, in bytes.
        offset: u64,
        /// Requested length, in bytes.
        len: u64,
        /// Error returned by the kernel.
        source: io::Error,
    },
}

/// Returns the pages that have data in the file of a guest with `len` bytes of memory, in order.
/// `len` is a multiple of 4096.
///
/// # Errors
/// [`SparseError`]
pub fn scan(file: &File, len: u64) -> Result<Vec<PageRun>, SparseError> {
    let failed = |offset| move |source: io::Error| SparseError::Scan { offset, source };
    let got = file.metadata().map_err(failed(0))?.len();
    if got != len {
        return Err(SparseError::Size { got, expected: len });
    }
    let mut runs: Vec<PageRun> = Vec::new();
    let mut at = 0;
    while at < len {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < len => start,
            // No data is left, or only data that was appended meanwhile.
            Ok(_) | Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(failed(at)(error.into())),
        };
        let end = seek(file, SeekFrom::Hole(start)).map_err(|error| failed(start)(error.into()))?;
        // Data of a page makes the whole page data.
        let start = start / PAGE_BYTES * PAGE_BYTES;
        let end = end
            .min(len)
            .next_multiple_of(PAGE_BYTES)
            .max(start + PAGE_BYTES);
        match runs.last_mut() {
            Some(last) if last.end() >= start => last.len = end - last.offset,
            _ => runs.push(PageRun {
                offset: start,
                len: end - start,
            }),
        }
        at = end;
    }
    Ok(runs)
}

/// Reads `runs` of the file, in pieces of at most [`BATCH_BYTES`].
///
/// Passes every piece to `take` with its offset, in the order of the runs.
///
/// # Errors
/// [`SparseError`], or the error returned by `take`; nothing is read after an error.
pub fn read_runs<E: From<SparseError>>(
    file: &File,
    runs: &[PageRun],
    mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; usize::try_from(BATCH_BYTES).unwrap_or(0)];
    for run in runs {
        let mut offset = run.offset;
        while offset < run.end() {
            let len = (run.end() - offset).min(BATCH_BYTES);
            let piece = usize::try_from(len)
                .ok()
                .and_then(|len| buffer.get_mut(..len));
            let piece = piece.unwrap_or_default();
            let read = file.read_exact_at(piece, offset);
            read.map_err(|source| SparseError::Read {
                offset,
                len,
                source,
            })?;
            take(offset, piece)?;
            offset += len;
        }
    }
    Ok(())
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

    /// Returns a file of `pages` pages in which those at `data` are written with their number.
    fn file(pages: u64, data: &[u64]) -> File {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(pages * PAGE_BYTES).expect("sparse");
        for page in data {
            let content = [u8::try_from(*page).expect("small"); 4096];
            file.write_all_at(&content, page * PAGE_BYTES)
                .expect("written");
        }
        file
    }

    #[test]
    fn pages_of_zeros_are_data_and_holes_are_not() {
        // Page 0 is written with zeros.
        let memory = file(20, &[0, 3, 4, 9, 19]);
        let runs = scan(&memory, 20 * PAGE_BYTES).expect("scanned");
        assert_eq!(runs, [run(0, 1), run(3, 2), run(9, 1), run(19, 1)]);
        let none = scan(&file(20, &[]), 20 * PAGE_BYTES).expect("scanned");
        assert_eq!(none, []);
    }

    #[test]
    fn content_is_read_in_order() {
        let memory = file(200, &[3, 4, 199]);
        let runs = scan(&memory, 200 * PAGE_BYTES).expect("scanned");
        let mut pages = Vec::new();
        read_runs(&memory, &runs, |offset, bytes| {
            for (index, page) in bytes.chunks(4096).enumerate() {
                assert!(page.iter().all(|byte| *byte == page[0]));
                pages.push((offset / PAGE_BYTES + index as u64, page[0]));
            }
            Ok::<_, SparseError>(())
        })
        .expect("read");
        assert_eq!(pages, [(3, 3), (4, 4), (199, 199)]);
    }

    #[test]
    fn long_runs_are_read_in_pieces() {
        let all: Vec<u64> = (0..200).collect();
        let memory = file(200, &all);
        let mut pieces = Vec::new();
        read_runs(&memory, &[run(0, 200)], |offset, bytes| {
            pieces.push((offset, bytes.len() as u64));
            Ok::<_, SparseError>(())
        })
        .expect("read");
        let expected: Vec<_> = (0..200 * PAGE_BYTES)
            .step_by(256 * 1024)
            .map(|offset| (offset, BATCH_BYTES.min(200 * PAGE_BYTES - offset)))
            .collect();
        assert_eq!(pieces, expected);
    }

    #[test]
    fn a_file_of_another_size_is_an_error() {
        let memory = file(20, &[3]);
        let error = scan(&memory, 21 * PAGE_BYTES).expect_err("too short");
        assert!(matches!(error, SparseError::Size { .. }), "{error}");
        // It may become shorter after it was scanned.
        let runs = scan(&memory, 20 * PAGE_BYTES).expect("scanned");
        memory.set_len(PAGE_BYTES).expect("possible");
        let read = read_runs(&memory, &runs, |_, _| Ok::<_, SparseError>(()));
        let error = read.expect_err("too short");
        assert!(matches!(error, SparseError::Read { offset, .. } if offset == 3 * PAGE_BYTES));
    }

    proptest::proptest! {
        #[test]
        fn every_page_that_was_written_is_found(
            pages in proptest::collection::btree_set(0_u64..64, 0..64),
        ) {
            let written: Vec<u64> = pages.iter().copied().collect();
            let memory = file(64, &written);
            let runs = scan(&memory, 64 * PAGE_BYTES).expect("scanned");
            let found: Vec<u64> = runs
                .iter()
                .flat_map(|run| (run.offset..run.end()).step_by(4096))
                .map(|offset| offset / PAGE_BYTES)
                .collect();
            assert_eq!(found, written);
        }
    }
}
