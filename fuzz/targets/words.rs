//! Headers of an upload that become extended attributes of a file, and the header that contains the
//! user.
#![no_main]

use http::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;
use wrenn_envd::{auth::basic_user, filesystem::metadata::from_headers};

fuzz_target!(|pairs: Vec<(&str, &[u8])>| {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs.iter().take(100) {
        let name = HeaderName::try_from(format!("x-metadata-{name}"));
        let value = HeaderValue::from_bytes(value);
        if let (Ok(name), Ok(value)) = (name, value) {
            let _ = basic_user(value.to_str().ok());
            headers.append(name, value);
        }
    }
    if let Ok(words) = from_headers(&headers) {
        let total: usize = words.iter().map(|(name, value)| name.len() + value.len()).sum();
        assert!(total <= 4096);
    }
});
