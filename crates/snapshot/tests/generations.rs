//! Tests of memory over many generations, against a model that keeps all content.
#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use std::{path::Path, sync::Arc};

use proptest::prelude::*;
use wrenn_snapshot::{Chain, ChainError, DiffError, DiffWriter, Header, SnapshotId, merge_files};

const PAGE: usize = 4096;
const PAGES: usize = 48;

/// Returns a page filled with one byte value; 0 yields a page of zeros.
fn page(value: u8) -> Vec<u8> {
    vec![value; PAGE]
}

fn write(
    dir: &Path,
    parent: Option<(Header, Arc<Chain>)>,
    dirty: &[(usize, u8)],
) -> (Header, Arc<Chain>, u64) {
    let build = SnapshotId::random();
    let path = dir.join(format!("{build}.mem"));
    let mut writer = DiffWriter::create(&path, build, (PAGES * PAGE) as u64, parent).unwrap();
    for (at, value) in dirty {
        writer.push((at * PAGE) as u64, &page(*value)).unwrap();
    }
    let (header, stats) = writer.finish().unwrap();
    let header = Header::parse(&header.to_bytes()).unwrap();
    let chain = Chain::open(&[dir.to_owned()], &header).unwrap();
    chain.verify().unwrap();
    (header, Arc::new(chain), stats.pages_written)
}

fn content(chain: &Chain) -> Vec<u8> {
    let mut all = vec![0xEE; PAGES * PAGE];
    chain.read_at(0, &mut all).unwrap();
    all
}

fn model_bytes(model: &[u8]) -> Vec<u8> {
    model.iter().flat_map(|value| page(*value)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_generation_keeps_its_content(
        generations in prop::collection::vec(prop::collection::btree_map(0..PAGES, 0..4_u8, 0..20), 1..8)
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut model = vec![0; PAGES];
        let mut parent: Option<(Header, Arc<Chain>)> = None;
        let mut history = Vec::new();
        for (number, dirty) in generations.iter().enumerate() {
            let dirty: Vec<_> = dirty.iter().map(|(at, value)| (*at, *value)).collect();
            let changed = dirty.iter().filter(|(at, value)| model[*at] != *value && *value != 0).count();
            for (at, value) in &dirty {
                model[*at] = *value;
            }
            let (header, chain, written) = write(dir.path(), parent.clone(), &dirty);
            // Only changed pages are written.
            prop_assert_eq!(written, changed as u64);
            prop_assert_eq!(header.generation(), number as u64);
            prop_assert_eq!(content(&chain), model_bytes(&model));
            history.push((chain.clone(), model.clone()));
            parent = Some((header, chain));
        }
        for (chain, model) in &history {
            prop_assert_eq!(content(chain), model_bytes(model));
        }
        // All files merged into one, or all but the first, give the same memory.
        let (header, chain) = parent.unwrap();
        let first: Vec<_> = header.diffs().iter().map(|diff| diff.build).take(1).collect();
        for keep in [vec![], first] {
            let build = SnapshotId::random();
            let path = dir.path().join(format!("{build}.mem"));
            let merged = merge_files(&header, &chain, &keep, &path, build).unwrap();
            prop_assert!(merged.diffs().len() <= 1 + keep.len());
            prop_assert!(keep.iter().all(|kept| merged.diffs().iter().any(|diff| diff.build == *kept)));
            prop_assert_eq!((merged.build(), merged.base()), (build, header.base()));
            prop_assert_eq!(merged.generation(), header.generation());
            let chain = Chain::open(&[dir.path().to_owned()], &merged).unwrap();
            chain.verify().unwrap();
            prop_assert_eq!(content(&chain), model_bytes(&model));
        }
    }
}

/// Step of a generation: pages with one value each, or a discarded range of pages.
#[derive(Debug, Clone)]
enum Change {
    Pages(usize, Vec<u8>),
    Discard(usize, usize),
}

impl Change {
    fn len(&self) -> usize {
        match self {
            Self::Pages(_, values) => values.len(),
            Self::Discard(_, len) => *len,
        }
    }
}

/// Returns changes in ascending order that do not overlap.
fn changes() -> impl Strategy<Value = Vec<Change>> {
    let step = (
        0..8_usize,
        prop_oneof![
            prop::collection::vec(0..4_u8, 1..6).prop_map(|values| Change::Pages(0, values)),
            (1..9_usize).prop_map(|len| Change::Discard(0, len)),
        ],
    );
    prop::collection::vec(step, 0..10).prop_map(|steps| {
        let mut at = 0;
        let mut changes = Vec::new();
        for (gap, change) in steps {
            at += gap;
            if at + change.len() > PAGES {
                break;
            }
            let len = change.len();
            changes.push(match change {
                Change::Pages(_, values) => Change::Pages(at, values),
                Change::Discard(_, len) => Change::Discard(at, len),
            });
            at += len;
        }
        changes
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn discarded_pages_are_zeros_and_cost_nothing(generations in prop::collection::vec(changes(), 1..8)) {
        let dir = tempfile::tempdir().unwrap();
        let mut model = vec![0; PAGES];
        let mut parent: Option<(Header, Arc<Chain>)> = None;
        for changes in &generations {
            let build = SnapshotId::random();
            let path = dir.path().join(format!("{build}.mem"));
            let bytes = (PAGES * PAGE) as u64;
            let mut writer = DiffWriter::create(&path, build, bytes, parent.clone()).unwrap();
            let (mut written, mut discarded) = (0, 0);
            for change in changes {
                match change {
                    Change::Pages(at, values) => {
                        writer.push((at * PAGE) as u64, &model_bytes(values)).unwrap();
                        for (at, value) in (*at..).zip(values) {
                            written += u64::from(model[at] != *value && *value != 0);
                            model[at] = *value;
                        }
                    }
                    Change::Discard(at, len) => {
                        writer.push_zeros((at * PAGE) as u64, (len * PAGE) as u64).unwrap();
                        for value in &mut model[*at..at + len] {
                            discarded += u64::from(*value != 0);
                            *value = 0;
                        }
                    }
                }
            }
            let (header, stats) = writer.finish().unwrap();
            prop_assert_eq!((stats.pages_written, stats.pages_discarded), (written, discarded));
            let header = Header::parse(&header.to_bytes()).unwrap();
            let stored = model.iter().filter(|value| **value != 0).count() * PAGE;
            prop_assert_eq!(header.stored_bytes(), stored as u64);
            let chain = Chain::open(&[dir.path().to_owned()], &header).unwrap();
            prop_assert_eq!(content(&chain), model_bytes(&model));
            parent = Some((header, Arc::new(chain)));
        }
    }
}

#[test]
fn a_file_whose_pages_are_all_discarded_is_not_named_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let (header, chain, _) = write(dir.path(), None, &[(1, 7), (2, 8), (9, 9)]);
    let first = header.build();
    let build = SnapshotId::random();
    let path = dir.path().join(format!("{build}.mem"));
    let bytes = (PAGES * PAGE) as u64;
    let mut writer = DiffWriter::create(&path, build, bytes, Some((header, chain))).unwrap();
    writer.push_zeros(0, bytes).unwrap();
    let error = writer.push_zeros(0, PAGE as u64).unwrap_err();
    assert!(
        matches!(error, DiffError::Pages { offset: 0, .. }),
        "{error}"
    );
    assert!(writer.push_zeros(bytes, PAGE as u64).is_err());
    let (header, stats) = writer.finish().unwrap();
    assert_eq!((stats.pages_written, stats.pages_discarded), (0, 3));
    assert_eq!(header.stored_bytes(), 0);
    assert!(header.diffs().iter().all(|diff| diff.build != first));
}

#[test]
fn diff_file_without_pages_is_not_referenced() {
    let dir = tempfile::tempdir().unwrap();
    let (header, chain, _) = write(dir.path(), None, &[(1, 7)]);
    let (header, _, _) = write(dir.path(), Some((header, chain)), &[(1, 8)]);
    assert_eq!(header.diffs().len(), 1);
    assert_eq!(header.diffs()[0].build, header.build());
}

#[test]
fn damaged_diff_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (header, _, _) = write(dir.path(), None, &[(1, 7), (2, 8)]);
    let path = dir.path().join(format!("{}.mem", header.build()));
    let dirs = [dir.path().to_owned()];
    let good = std::fs::read(&path).unwrap();

    let mut flipped = good.clone();
    flipped[5000] ^= 1;
    std::fs::write(&path, flipped).unwrap();
    let error = Chain::open(&dirs, &header).unwrap().verify().unwrap_err();
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );

    std::fs::write(&path, &good[..4096]).unwrap();
    let error = Chain::open(&dirs, &header).unwrap_err();
    assert!(
        matches!(
            error,
            ChainError::Length {
                got: 4096,
                want: 8192,
                ..
            }
        ),
        "{error}"
    );

    // A file that is truncated while it is open yields an error and no signal.
    std::fs::write(&path, &good).unwrap();
    let chain = Chain::open(&dirs, &header).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    let mut buffer = page(0);
    let error = chain.read_at(2 * PAGE as u64, &mut buffer).unwrap_err();
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );

    std::fs::remove_file(&path).unwrap();
    let error = Chain::open(&dirs, &header).unwrap_err();
    assert!(
        error.to_string().contains(&header.build().to_string()),
        "{error}"
    );
}

#[test]
fn page_outside_memory_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("diff");
    let mut writer =
        DiffWriter::create(&path, SnapshotId::random(), 4 * PAGE as u64, None).unwrap();
    writer.push(PAGE as u64, &page(1)).unwrap();
    for (offset, len) in [
        (0, PAGE),
        (2 * PAGE + 1, PAGE),
        (2 * PAGE, 100),
        (3 * PAGE, 2 * PAGE),
    ] {
        let error = writer.push(offset as u64, &vec![1; len]).unwrap_err();
        assert!(matches!(error, DiffError::Pages { .. }), "{error}");
    }
}
