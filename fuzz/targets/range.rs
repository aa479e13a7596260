//! `Range` header of a download.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wrenn_envd::http::download::parse_range;

fuzz_target!(|input: (&str, u64)| {
    let _ = parse_range(input.0, input.1);
});
