//! A packet that a guest sends to the time service.
#![no_main]

use std::time::UNIX_EPOCH;

use libfuzzer_sys::fuzz_target;
use wrenn_supervisor::ntp;

fuzz_target!(|bytes: &[u8]| {
    if let Some(answer) = ntp::answer(bytes, UNIX_EPOCH, UNIX_EPOCH) {
        // Never longer than what was asked: nobody is flooded by it.
        assert!(answer.len() <= bytes.len());
    }
});
