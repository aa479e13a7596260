//! Runs of pages.

use crate::PAGE_BYTES;

/// Run of whole pages of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRun {
    /// Offset in guest memory, in bytes; a multiple of 4096.
    pub offset: u64,
    /// Length, in bytes; a multiple of 4096, not 0.
    pub len: u64,
}

impl PageRun {
    /// Returns runs, in ascending order, that cover every page of `offsets` (in bytes, in any
    /// order, duplicates allowed). A gap between two pages of at most `max_gap_bytes` is covered as
    /// well.
    ///
    /// Used to build a prefetch list from recorded faults: loading a gap of a few pages costs less
    /// than one more request.
    #[must_use]
    pub fn covering(offsets: &[u64], max_gap_bytes: u64) -> Vec<Self> {
        let mut pages: Vec<u64> = offsets
            .iter()
            .map(|offset| offset / PAGE_BYTES * PAGE_BYTES)
            .filter(|offset| offset.checked_add(PAGE_BYTES).is_some())
            .collect();
        pages.sort_unstable();
        pages.dedup();
        let mut runs: Vec<Self> = Vec::new();
        for offset in pages {
            match runs.last_mut() {
                Some(last) if offset - last.end() <= max_gap_bytes => {
                    last.len = offset + PAGE_BYTES - last.offset;
                }
                _ => runs.push(Self {
                    offset,
                    len: PAGE_BYTES,
                }),
            }
        }
        runs
    }

    /// Returns the offset after the last byte; at most 2^64 - 1.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_runs_are_joined_across_small_gaps() {
        let run = |first: u64, pages: u64| PageRun {
            offset: first * 4096,
            len: pages * 4096,
        };
        let offsets: Vec<u64> = [9, 2, 3, 1, 3, 6].map(|page| page * 4096).to_vec();
        assert_eq!(
            PageRun::covering(&offsets, 0),
            [run(1, 3), run(6, 1), run(9, 1)]
        );
        assert_eq!(PageRun::covering(&offsets, 8192), [run(1, 9)]);
        assert_eq!(PageRun::covering(&[u64::MAX, 4097], 0), [run(1, 1)]);
        assert!(PageRun::covering(&[], 4096).is_empty());
    }

    proptest::proptest! {
        #[test]
        fn every_page_is_covered(pages in proptest::collection::vec(0_u64..200, 0..60), gap in 0_u64..9) {
            let offsets: Vec<u64> = pages.iter().map(|page| page * 4096).collect();
            let runs = PageRun::covering(&offsets, gap * 4096);
            for offset in &offsets {
                assert!(runs.iter().any(|run| run.offset <= *offset && *offset < run.end()));
            }
            for pair in runs.windows(2) {
                assert!(pair[1].offset > pair[0].end() + gap * 4096);
            }
        }
    }
}
