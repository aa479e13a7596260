//! Memory header. An accepted header must serialize to the same bytes and cover all of its memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wrenn_snapshot::Header;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = Header::parse(bytes) {
        assert_eq!(header.to_bytes(), bytes);
        assert!(header.lookup(header.memory_size() - 1).is_some());
    }
    // The fixed part can also be read alone.
    let _ = Header::summary(bytes);
});
