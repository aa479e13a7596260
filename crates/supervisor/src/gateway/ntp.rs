//! Time service for a guest that has no clock device: SNTP responses from its gateway.
//!
//! The guest's chronyd sends a request every few seconds and steps its clock if it is wrong, which
//! corrects the clock after a pause. The response contains the host's time. The service keeps no
//! state and sends one response of the same size per packet, so a guest cannot use it for
//! amplification.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::net::UdpSocket;
use wrenn_proto::ntp::{PACKET_BYTES as NTP_PACKET_BYTES, UNIX_OFFSET_SEC as NTP_UNIX_OFFSET_SEC};

/// Answers requests until the task is aborted.
pub(crate) async fn serve(socket: UdpSocket) {
    let mut packet = [0; 512];
    loop {
        let (length, client) = match socket.recv_from(&mut packet).await {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!(%error, "failed to receive a time request");
                // A persistent error must not cause a busy loop.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let received = SystemTime::now();
        if let Some(answer) = answer(&packet[..length], received, SystemTime::now()) {
            // If the response is lost, the client sends another request.
            let _ = socket.send_to(&answer, client).await;
        }
    }
}

/// Returns the response to a client's packet; `None` if it is not a client's packet. RFC 5905,
/// section 7.3; big-endian.
///
/// | off | size | field                  | value in a response                             |
/// |-----|------|------------------------|-------------------------------------------------|
/// |   0 |    1 | leap, version, mode    | 0, the client's version (1 to 4), 4 = server    |
/// |   1 |    1 | stratum                | 10: a local clock, worse than any real server   |
/// |   2 |    1 | poll                   | the client's value                              |
/// |   3 |    1 | precision              | -20: about one microsecond                      |
/// |   4 |    8 | root delay, dispersion | 0                                               |
/// |  12 |    4 | reference id           | `WREN`                                          |
/// |  16 |    8 | reference time         | time of receipt                                 |
/// |  24 |    8 | origin time            | the client's transmit time                      |
/// |  32 |    8 | receive time           | time of receipt                                 |
/// |  40 |    8 | transmit time          | time of the response                            |
///
/// A time is the number of seconds since 1900 in 32 bits, modulo 2^32, followed by the fraction of
/// a second in units of 2^-32.
#[must_use]
pub fn answer(
    request: &[u8],
    received: SystemTime,
    sent: SystemTime,
) -> Option<[u8; NTP_PACKET_BYTES]> {
    const CLIENT: u8 = 3;
    const SERVER: u8 = 4;
    let request: &[u8; NTP_PACKET_BYTES] = request.first_chunk()?;
    let (version, mode) = (request[0] >> 3 & 7, request[0] & 7);
    if mode != CLIENT || !(1..=4).contains(&version) {
        return None;
    }
    let mut answer = [0; NTP_PACKET_BYTES];
    answer[0] = version << 3 | SERVER;
    answer[1] = 10;
    answer[2] = request[2];
    answer[3] = (-20_i8).cast_unsigned();
    answer[12..16].copy_from_slice(b"WREN");
    answer[16..24].copy_from_slice(&timestamp(received));
    answer[24..32].copy_from_slice(&request[40..48]);
    answer[32..40].copy_from_slice(&timestamp(received));
    answer[40..48].copy_from_slice(&timestamp(sent));
    Some(answer)
}

fn timestamp(time: SystemTime) -> [u8; 8] {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = (since.as_secs() + NTP_UNIX_OFFSET_SEC) & u64::from(u32::MAX);
    let fraction = (u64::from(since.subsec_nanos()) << 32) / 1_000_000_000;
    (seconds << 32 | fraction).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ntp_response_has_the_documented_bytes() {
        let mut request = [0; NTP_PACKET_BYTES];
        request[0] = 4 << 3 | 3;
        request[2] = 6;
        request[40..48].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let received = UNIX_EPOCH + Duration::new(1, 500_000_000);
        let sent = UNIX_EPOCH + Duration::new(2, 250_000_000);
        let answer = answer(&request, received, sent).expect("a client's packet");
        let (at_1_5, at_2_25) = (
            [0x83, 0xaa, 0x7e, 0x81, 0x80, 0, 0, 0],
            [0x83, 0xaa, 0x7e, 0x82, 0x40, 0, 0, 0],
        );
        assert_eq!(answer[..16], *b"\x24\x0a\x06\xec\0\0\0\0\0\0\0\0WREN");
        assert_eq!(answer[16..24], at_1_5);
        assert_eq!(answer[24..32], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(answer[32..40], at_1_5);
        assert_eq!(answer[40..48], at_2_25);
    }

    #[test]
    fn packet_that_is_no_client_request_is_ignored() {
        let now = SystemTime::now();
        assert_eq!(answer(&[], now, now), None);
        assert_eq!(answer(&[0x23; 47], now, now), None);
        // A server's packet. A response to it could make two servers exchange packets forever.
        assert_eq!(answer(&[0x24; 48], now, now), None);
    }

    proptest! {
        #[test]
        fn any_packet_is_answered_or_ignored(packet in proptest::collection::vec(any::<u8>(), 0..600)) {
            let now = SystemTime::now();
            let _ = answer(&packet, now, now);
        }
    }
}
