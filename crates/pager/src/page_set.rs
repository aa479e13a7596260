//! Set of pages, stored as one bit per page. Allocates nothing until the first page is inserted.

use crate::PAGE_BYTES;

/// Set of pages of guest memory, addressed by offset in bytes.
#[derive(Debug)]
pub(crate) struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// Creates an empty set for memory of `len` bytes.
    pub(crate) fn new(len: u64) -> Self {
        Self {
            words: Vec::new(),
            pages: len / PAGE_BYTES,
        }
    }

    /// Inserts every page of `offset..offset + len`. Pages beyond the memory are ignored.
    pub(crate) fn insert(&mut self, offset: u64, len: u64) {
        if self.words.is_empty() {
            let words = usize::try_from(self.pages.div_ceil(64)).unwrap_or(0);
            self.words = vec![0; words];
        }
        let end = offset.saturating_add(len).div_ceil(PAGE_BYTES);
        for page in offset / PAGE_BYTES..end.min(self.pages) {
            if let Some(word) = self.word_mut(page) {
                *word |= 1 << (page % 64);
            }
        }
    }

    /// True if the page at `offset` is in the set.
    pub(crate) fn contains(&self, offset: u64) -> bool {
        let page = offset / PAGE_BYTES;
        let word = usize::try_from(page / 64)
            .ok()
            .and_then(|index| self.words.get(index));
        word.is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    /// Returns the length, in bytes, of the run from `offset` whose pages are all in the set
    /// (`inside`) or all outside. The length is at most `len`.
    pub(crate) fn run(&self, offset: u64, len: u64, inside: bool) -> u64 {
        if self.words.is_empty() {
            return if inside { 0 } else { len };
        }
        let mut done = 0;
        while done < len && self.contains(offset + done) == inside {
            done += PAGE_BYTES;
        }
        done.min(len)
    }

    fn word_mut(&mut self, page: u64) -> Option<&mut u64> {
        self.words.get_mut(usize::try_from(page / 64).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_set_finds_pages_and_run_lengths() {
        let mut set = PageSet::new(200 * 4096);
        assert!(!set.contains(0));
        assert_eq!(set.run(0, 8 * 4096, false), 8 * 4096);
        assert_eq!(set.run(0, 8 * 4096, true), 0);
        set.insert(63 * 4096, 3 * 4096);
        assert!(!set.contains(62 * 4096) && !set.contains(66 * 4096));
        assert!((63..66).all(|page| set.contains(page * 4096)));
        assert_eq!(set.run(63 * 4096, 8 * 4096, true), 3 * 4096);
        assert_eq!(set.run(60 * 4096, 8 * 4096, false), 3 * 4096);
        set.insert(199 * 4096, u64::MAX);
        assert!(set.contains(199 * 4096) && !set.contains(200 * 4096));
    }
}
