//! Manifest of a snapshot. An accepted manifest must be unchanged after it is written and read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wrenn_snapshot::Manifest;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(manifest) = Manifest::parse(bytes) {
        let written = serde_json::to_vec(&manifest).expect("plain data");
        let again = Manifest::parse(&written).expect("a written manifest");
        assert_eq!(again, manifest);
    }
});
