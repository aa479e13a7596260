//! Record of the pages that a restore needs. An accepted record must serialize to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wrenn_snapshot::WorkingSet;
use xxhash_rust::xxh3::xxh3_64;

/// Length of the magic, the number of runs and the checksum, in bytes.
const FIXED_BYTES: usize = 24;
/// Length of a run, in bytes.
const RUN_BYTES: usize = 16;

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    if let Some(repaired) = repair(bytes) {
        check(&repaired);
    }
});

fn check(bytes: &[u8]) {
    if let Ok(set) = WorkingSet::parse(bytes) {
        assert_eq!(set.to_bytes(), bytes);
        assert!(
            set.runs()
                .all(|(offset, len)| offset.checked_add(len).is_some())
        );
    }
}

/// Makes magic, number of runs and checksum valid, so that the runs themselves are parsed.
fn repair(bytes: &[u8]) -> Option<Vec<u8>> {
    let count = bytes.len().checked_sub(FIXED_BYTES)? / RUN_BYTES;
    let runs = &bytes[FIXED_BYTES..FIXED_BYTES + RUN_BYTES * count];
    let mut repaired = b"WRENNWS1".to_vec();
    repaired.extend((count as u64).to_le_bytes());
    repaired.extend(xxh3_64(runs).to_le_bytes());
    repaired.extend(runs);
    Some(repaired)
}
