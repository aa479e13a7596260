//! Record of the pages that a restore needs.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wrenn_snapshot::WorkingSet;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(set) = WorkingSet::parse(bytes) {
        assert!(set.runs().all(|(offset, len)| offset.checked_add(len).is_some()));
    }
});
