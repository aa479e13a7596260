//! Tests with golden bytes, round trips and damaged headers.

use proptest::prelude::*;

use super::*;

fn example() -> Header {
    let (first, second) = (SnapshotId([0x11; 16]), SnapshotId([0x22; 16]));
    let file = |build, len| DiffFile {
        build,
        len,
        checksum: 0x0102_0304_0506_0708,
    };
    let mapping = |page: u64, pages: u64, source| Mapping {
        offset: page * PAGE_BYTES,
        len: pages * PAGE_BYTES,
        source,
    };
    let diff = |file, page: u64| Source::Diff {
        file,
        offset: page * PAGE_BYTES,
    };
    let summary = Summary {
        memory_size: 8 * PAGE_BYTES,
        generation: 1,
        build: second,
        base: first,
    };
    let mappings = vec![
        mapping(0, 2, diff(0, 1)),
        mapping(2, 3, Source::Zero),
        mapping(5, 1, diff(1, 0)),
        mapping(6, 2, diff(0, 4)),
    ];
    let diffs = vec![file(first, 6 * PAGE_BYTES), file(second, PAGE_BYTES)];
    Header::new(summary, diffs, mappings).expect("parts are consistent")
}

#[test]
fn header_has_the_documented_bytes() {
    let bytes = example().to_bytes();
    assert_eq!(bytes.len(), 96 + 6 * 32);
    let golden = include_bytes!("../../tests/fixtures/header-v1.bin");
    assert_eq!(
        bytes, golden,
        "the format has changed: give it another version"
    );
    assert_eq!(Header::parse(golden), Ok(example()));
    assert_eq!(bytes[..8], MAGIC);
    assert_eq!(bytes[24..32], (8 * 4096_u64).to_le_bytes());
    assert_eq!(bytes[32..40], 1_u64.to_le_bytes());
    // The second mapping covers 3 pages of zeros from page 2.
    let entry = &bytes[96 + 3 * 32..][..32];
    assert_eq!(entry[..8], (2 * 4096_u64).to_le_bytes());
    assert_eq!(entry[8..16], (3 * 4096_u64).to_le_bytes());
    assert_eq!(entry[16..20], [0xFF; 4]);
}

#[test]
fn fixed_part_can_be_read_alone() {
    let bytes = example().to_bytes();
    let summary = Header::summary(&bytes[..FIXED_BYTES]).expect("whole");
    assert_eq!((summary.memory_size, summary.generation), (8 * 4096, 1));
}

#[test]
fn truncated_or_changed_header_is_rejected() {
    let bytes = example().to_bytes();
    for end in 0..bytes.len() {
        assert!(Header::parse(&bytes[..end]).is_err(), "{end} bytes");
    }
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            assert!(Header::parse(&damaged).is_err(), "byte {at}, bit {bit}");
        }
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(
        Header::parse(&longer),
        Err(HeaderError::Length { .. })
    ));
}

/// Changes one mapping of the example and returns the reported problem.
fn problem(index: usize, change: impl FnOnce(&mut Mapping)) -> Option<Problem> {
    let mut header = example();
    change(&mut header.mappings[index]);
    // The checksum is valid, so that the entries themselves are checked.
    match Header::parse(&header.to_bytes()) {
        Err(HeaderError::Entry {
            index: at,
            problem,
            offset,
            ..
        }) => {
            assert!(offset >= FIXED_BYTES && at >= index.saturating_sub(1));
            Some(problem)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn inconsistent_header_is_rejected_with_its_position() {
    let diff = |file, offset| Source::Diff { file, offset };
    assert_eq!(problem(1, |m| m.offset += 1), Some(Problem::Misaligned));
    assert_eq!(problem(1, |m| m.len = 0), Some(Problem::Empty));
    assert_eq!(
        problem(1, |m| m.offset += 4096),
        Some(Problem::GapOrOverlap)
    );
    assert_eq!(
        problem(1, |m| m.offset -= 4096),
        Some(Problem::GapOrOverlap)
    );
    assert_eq!(problem(3, |m| m.len += 4096), Some(Problem::OutsideMemory));
    assert_eq!(
        problem(3, |m| m.len = u64::MAX - 4095),
        Some(Problem::OutsideMemory)
    );
    assert_eq!(
        problem(2, |m| m.source = diff(2, 0)),
        Some(Problem::NoSuchFile)
    );
    assert_eq!(
        problem(2, |m| m.source = diff(1, 4096)),
        Some(Problem::OutsideFile)
    );
    assert_eq!(
        problem(2, |m| m.source = diff(1, u64::MAX - 4095)),
        Some(Problem::OutsideFile)
    );
    assert_eq!(
        problem(2, |m| m.source = diff(1, 8)),
        Some(Problem::Misaligned)
    );
    let mut short = example();
    short.mappings.pop();
    assert!(matches!(
        Header::parse(&short.to_bytes()),
        Err(HeaderError::Incomplete {
            end: 24_576,
            size: 32_768
        })
    ));
    let mut twice = example();
    twice.diffs[1].build = twice.diffs[0].build;
    assert!(Header::parse(&twice.to_bytes()).is_err());
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Header::parse(&bytes);
    }

    #[test]
    fn no_entries_make_the_parser_panic(entries in prop::collection::vec(any::<u8>(), 32 * 3)) {
        let mut header = example();
        header.mappings.truncate(1);
        let mut bytes = header.to_bytes();
        bytes.truncate(FIXED_BYTES);
        bytes.extend(entries);
        let sum = checksum(&bytes).to_le_bytes();
        bytes[CHECKSUM_AT..CHECKSUM_AT + 8].copy_from_slice(&sum);
        let _ = Header::parse(&bytes);
    }
}
