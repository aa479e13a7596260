//! Header of a disk layer that a VMM wrote.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wrenn_disk::Header;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = Header::parse(bytes) {
        // An accepted header names no file of the host, and has no incompatible feature.
        assert!(
            header
                .backing_file
                .is_none_or(|name| name == "/tmp/fc-vm/base")
        );
        assert_eq!(bytes[72..80], [0; 8]);
    }
});
