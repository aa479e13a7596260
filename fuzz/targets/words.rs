//! Headers of an upload that become extended attributes of a file, and the header that contains the
//! user. Each line is `name:value`.
#![no_main]

use http::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;
use wrenn_envd::{auth::basic_user, filesystem::metadata::from_headers};

fuzz_target!(|input: &[u8]| {
    let mut headers = HeaderMap::new();
    for line in input.split(|byte| *byte == b'\n').take(100) {
        let colon = line.iter().position(|byte| *byte == b':');
        let (name, value) = line.split_at(colon.unwrap_or(line.len()));
        let name = HeaderName::try_from([b"x-metadata-", name].concat());
        let value = HeaderValue::from_bytes(value.get(1..).unwrap_or_default());
        if let (Ok(name), Ok(value)) = (name, value) {
            let _ = basic_user(value.to_str().ok());
            headers.append(name, value);
        }
    }
    if let Ok(words) = from_headers(&headers) {
        let total: usize = words
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        assert!(total <= 4096);
    }
});
