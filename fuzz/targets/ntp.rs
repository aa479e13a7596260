//! Packet sent by a guest to the time service. The first 12 bytes of the input are the time of
//! receipt.
#![no_main]

use std::time::{Duration, UNIX_EPOCH};

use libfuzzer_sys::fuzz_target;
use wrenn_supervisor::gateway::ntp;

fuzz_target!(|input: &[u8]| {
    let Some((&time, packet)) = input.split_first_chunk::<12>() else {
        return;
    };
    let [a, b, c, d, e, f, g, h, nanos @ ..] = time;
    // Four centuries, which covers several eras of the protocol's 32-bit seconds.
    let seconds = u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 30;
    let nanos = u32::from_be_bytes(nanos) % 1_000_000_000;
    let received = UNIX_EPOCH + Duration::new(seconds, nanos);
    let sent = received + Duration::from_millis(1);
    if let Some(answer) = ntp::answer(packet, received, sent) {
        // The response is never longer than the request, so it cannot be used for amplification.
        assert!(answer.len() <= packet.len());
        assert_eq!(answer[24..32], packet[40..48]);
        assert_eq!(answer[0] & 7, 4);
    }
});
