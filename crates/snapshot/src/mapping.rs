//! Mappings of pages to diff files: sorted ranges of guest memory, without gaps and overlaps.

use crate::PAGE_BYTES;

/// Location of the content of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// No location: the range is all zeros.
    Zero,
    /// In a diff file.
    Diff {
        /// Index of the file in the header's table.
        file: u32,
        /// Offset from the start of the file, in bytes; a multiple of 4096.
        offset: u64,
    },
}

impl Source {
    /// Returns the source of the content `bytes` further on.
    #[must_use]
    pub fn advanced(self, bytes: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Diff { file, offset } => Self::Diff {
                file,
                offset: offset.saturating_add(bytes),
            },
        }
    }
}

/// Range of guest memory and the location of its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Offset in guest memory, in bytes; a multiple of 4096.
    pub offset: u64,
    /// Length, in bytes; a multiple of 4096, not 0.
    pub len: u64,
    /// Location of the content.
    pub source: Source,
}

impl Mapping {
    /// Returns the offset after the last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Returns the part from `start` to `end`, which both lie inside of the mapping.
    fn part(&self, start: u64, end: u64) -> Self {
        Self {
            offset: start,
            len: end - start,
            source: self.source.advanced(start - self.offset),
        }
    }
}

/// Returns the source of the content at `offset` and the number of bytes from there in the same
/// mapping. Returns `None` if `offset` is not mapped.
///
/// O(log n).
#[must_use]
pub fn lookup(mappings: &[Mapping], offset: u64) -> Option<(Source, u64)> {
    let behind = mappings.partition_point(|mapping| mapping.offset <= offset);
    let mapping = mappings.get(behind.checked_sub(1)?)?;
    let inside = offset - mapping.offset;
    (inside < mapping.len).then(|| (mapping.source.advanced(inside), mapping.len - inside))
}

/// Returns the parts of `base` that `changes` does not cover. Both are sorted and do not overlap in
/// themselves; `changes` may have gaps.
///
/// O(n + m).
#[must_use]
pub fn overlay(base: &[Mapping], changes: &[Mapping]) -> Vec<Mapping> {
    let mut result = Vec::with_capacity(base.len() + 2 * changes.len());
    let mut changes = changes.iter().peekable();
    for below in base {
        let mut at = below.offset;
        // Processes the changes that begin in this mapping. At most one earlier change extends into
        // it.
        while at < below.end() {
            match changes.peek() {
                Some(change) if change.end() <= at => {
                    changes.next();
                }
                Some(change) if change.offset <= at => {
                    at = change.end().min(below.end());
                }
                Some(change) if change.offset < below.end() => {
                    result.push(below.part(at, change.offset));
                    at = change.offset;
                }
                _ => {
                    result.push(below.part(at, below.end()));
                    at = below.end();
                }
            }
        }
    }
    result
}

/// Merges adjacent mappings that are contiguous in memory and in their file.
pub fn normalise(mappings: &mut Vec<Mapping>) {
    mappings.dedup_by(|next, first| {
        let joined = first.end() == next.offset && first.source.advanced(first.len) == next.source;
        if joined {
            first.len += next.len;
        }
        joined
    });
}

/// Returns `base` with `changes` applied, sorted and merged.
pub(crate) fn merged(base: &[Mapping], changes: &[Mapping]) -> Vec<Mapping> {
    let mut all = overlay(base, changes);
    all.extend_from_slice(changes);
    all.sort_unstable_by_key(|mapping| mapping.offset);
    normalise(&mut all);
    all
}

/// True if a number of bytes is a multiple of the page size.
pub(crate) const fn is_aligned(bytes: u64) -> bool {
    bytes.is_multiple_of(PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: usize = 64;

    /// Source of each page according to the model.
    type Model = Vec<Source>;

    fn source(file: u32, page: u64) -> Source {
        Source::Diff {
            file,
            offset: page * PAGE_BYTES,
        }
    }

    /// Returns the mappings of a model, also split at the pages in `cuts`.
    fn mappings_of(model: &Model, cuts: &[usize]) -> Vec<Mapping> {
        let mut list: Vec<Mapping> = Vec::new();
        for (page, source) in model.iter().enumerate() {
            let offset = page as u64 * PAGE_BYTES;
            match list.last_mut() {
                Some(last)
                    if !cuts.contains(&page) && last.source.advanced(last.len) == *source =>
                {
                    last.len += PAGE_BYTES;
                }
                _ => list.push(Mapping {
                    offset,
                    len: PAGE_BYTES,
                    source: *source,
                }),
            }
        }
        list
    }

    fn model() -> impl Strategy<Value = Model> {
        let page = prop_oneof![
            Just(Source::Zero),
            (0..3_u32, 0..8_u64).prop_map(|(file, page)| source(file, page)),
        ];
        // The model consists of runs, so that there are mappings to split.
        prop::collection::vec((page, 1..9_usize), PAGES).prop_map(|runs| {
            let mut model = Model::new();
            for (first, length) in runs {
                for step in 0..length {
                    model.push(first.advanced(step as u64 * PAGE_BYTES));
                }
            }
            model.truncate(PAGES);
            model
        })
    }

    fn looked_up(mappings: &[Mapping]) -> Model {
        (0..PAGES as u64)
            .map(|page| {
                lookup(mappings, page * PAGE_BYTES)
                    .expect("all is mapped")
                    .0
            })
            .collect()
    }

    proptest! {
        #[test]
        fn lookup_matches_the_model(model in model(), cuts in prop::collection::vec(0..PAGES, 0..10)) {
            let list = mappings_of(&model, &cuts);
            prop_assert_eq!(looked_up(&list), model);
            prop_assert_eq!(lookup(&list, PAGES as u64 * PAGE_BYTES), None);
        }

        #[test]
        fn normalization_keeps_every_lookup(model in model(), cuts in prop::collection::vec(0..PAGES, 0..20)) {
            let mut list = mappings_of(&model, &cuts);
            normalise(&mut list);
            prop_assert_eq!(looked_up(&list), model.clone());
            prop_assert_eq!(list, mappings_of(&model, &[]));
        }

        #[test]
        fn merge_equals_overlaying_page_by_page(base in model(), top in model(), changed in prop::collection::vec(any::<bool>(), PAGES)) {
            let changes: Vec<_> = mappings_of(&top, &(0..PAGES).collect::<Vec<_>>())
                .into_iter()
                .zip(&changed)
                .filter_map(|(mapping, changed)| changed.then_some(mapping))
                .collect();
            let mut joined = changes.clone();
            normalise(&mut joined);
            let expected: Model = base.iter().zip(&top).zip(&changed)
                .map(|((below, above), changed)| if *changed { *above } else { *below })
                .collect();
            let merged = merged(&mappings_of(&base, &[]), &joined);
            prop_assert_eq!(looked_up(&merged), expected);
            prop_assert!(merged.is_sorted_by_key(|m| m.offset));
            prop_assert_eq!(merged.iter().map(|m| m.len).sum::<u64>(), PAGES as u64 * PAGE_BYTES);
        }
    }

    #[test]
    fn pieces_that_are_not_contiguous_in_their_file_are_not_joined() {
        let mut list = vec![
            Mapping {
                offset: 0,
                len: PAGE_BYTES,
                source: source(0, 0),
            },
            Mapping {
                offset: PAGE_BYTES,
                len: PAGE_BYTES,
                source: source(0, 5),
            },
        ];
        normalise(&mut list);
        assert_eq!(list.len(), 2);
    }
}
