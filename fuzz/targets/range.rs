//! `Range` header of a download. Lines: the header, the size of the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wrenn_envd::http::download::{Range, parse_range};
use wrenn_fuzz::texts;

fuzz_target!(|input: &[u8]| {
    let Some([header, size]) = texts(input) else {
        return;
    };
    let size = size.parse().unwrap_or(u64::MAX);
    if let Range::Part { first, last } = parse_range(header, size) {
        assert!(first <= last && last < size);
    }
});
