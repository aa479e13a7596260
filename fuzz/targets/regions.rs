//! Memory layout reported by a VMM.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wrenn_pager::Regions;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(regions) = Regions::from_json(bytes) {
        for region in regions.as_slice() {
            assert!(region.offset + region.len <= regions.end_offset());
        }
    }
});
