//! Packet sent by a guest to the time service.
#![no_main]

use std::time::UNIX_EPOCH;

use libfuzzer_sys::fuzz_target;
use wrenn_supervisor::ntp;

fuzz_target!(|bytes: &[u8]| {
    if let Some(answer) = ntp::answer(bytes, UNIX_EPOCH, UNIX_EPOCH) {
        // The response is never longer than the request, so it cannot be used for amplification.
        assert!(answer.len() <= bytes.len());
    }
});
