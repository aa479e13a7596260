//! Requests of a guest to the metadata service. `TOKEN` in a request is replaced by a valid token,
//! which no mutation finds.
#![no_main]

use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use wrenn_supervisor::gateway::mmds::{Mmds, http::Request};

const TOKEN_REQUEST: &[u8] =
    b"PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n";

fuzz_target!(|bytes: &[u8]| {
    let now = Instant::now();
    let mut mmds = Mmds::new(serde_json::json!({ "instanceID": "sb-1", "more": { "x": 1 } }));
    let request = Request::parse(TOKEN_REQUEST)
        .expect("valid")
        .expect("complete");
    let token = mmds.answer(&request, now).body;
    let bytes = replace(bytes, b"TOKEN", token.as_bytes());
    if let Ok(Some(request)) = Request::parse(&bytes) {
        let answer = mmds.answer(&request, now);
        // Bytes sent by the guest must not appear in the head of the response.
        let sent = answer.to_bytes();
        let head = sent.windows(4).position(|four| four == b"\r\n\r\n");
        assert_eq!(head.map(|at| sent.len() - at - 4), Some(answer.body.len()));
    }
});

/// Replaces the first occurrence of `from`.
fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    match bytes.windows(from.len()).position(|part| part == from) {
        Some(at) => [&bytes[..at], to, &bytes[at + from.len()..]].concat(),
        None => bytes.to_vec(),
    }
}
