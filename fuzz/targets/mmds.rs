//! Request of a guest to the metadata service.
#![no_main]

use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use wrenn_supervisor::mmds::{Mmds, http::Request};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(Some(request)) = Request::parse(bytes) {
        let mut mmds = Mmds::new(serde_json::json!({ "instanceID": "sb-1", "more": { "x": 1 } }));
        let answer = mmds.answer(&request, Instant::now());
        // Bytes sent by the guest must not appear in the head of the response.
        let sent = answer.to_bytes();
        let head = sent.windows(4).position(|four| four == b"\r\n\r\n");
        assert_eq!(head.map(|at| sent.len() - at - 4), Some(answer.body.len()));
    }
});
