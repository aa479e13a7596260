//! The machine's clock, right before a restored machine is reported running.
//!
//! A restored machine's clock stands where it was frozen: for a template's booted guest that is the age of the image. chronyd
//! steps it within seconds; the first commands of a sandbox run before that. So this asks the gateway for the time once, in
//! the packets of RFC 5905 (SNTP), and steps the clock if it is off. Nobody sets it from outside, and whatever fails is left to
//! chronyd.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::time::{ClockId, Timespec, clock_settime};
use wrenn_proto::limits::{GATEWAY_IP, NTP_PACKET_BYTES, NTP_UNIX_OFFSET_SEC};

/// Port of the network time protocol.
const NTP_PORT: u16 = 123;

/// How long the gateway, which is a process of the same host, may take.
const DEADLINE: Duration = Duration::from_millis(300);

/// What chronyd may repair by itself, gently.
const TOLERANCE: Duration = Duration::from_millis(100);

/// Seconds after which the seconds of NTP begin anew.
const ERA: u64 = 1 << 32;

/// Steps this machine's clock to the gateway's, if it is off.
///
/// # Errors
/// If the gateway does not answer, or the kernel refuses.
pub fn step_to_gateway() -> io::Result<()> {
    let right = ask(SocketAddr::from((GATEWAY_IP, NTP_PORT)))?;
    let now = SystemTime::now();
    let off = right
        .duration_since(now)
        .or_else(|_| now.duration_since(right));
    if off.unwrap_or_default() <= TOLERANCE {
        return Ok(());
    }
    let since = right.duration_since(UNIX_EPOCH).map_err(io::Error::other)?;
    let time = Timespec {
        tv_sec: i64::try_from(since.as_secs()).map_err(io::Error::other)?,
        tv_nsec: since.subsec_nanos().into(),
    };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

/// The time of a server, now.
fn ask(server: SocketAddr) -> io::Result<SystemTime> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.set_read_timeout(Some(DEADLINE))?;
    socket.connect(server)?;
    // Not this machine's time, which is nobody's business: only its answer has these.
    let mut nonce = [0; 8];
    rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())?;
    let asked = std::time::Instant::now();
    socket.send(&request(nonce))?;
    let mut packet = [0; 512];
    let length = socket.recv(&mut packet)?;
    let way = asked.elapsed() / 2;
    read(&packet[..length], nonce)
        .and_then(|sent| sent.checked_add(way))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no answer of a time server"))
}

/// A client's packet: version 4, mode 3; its transmit time (at 40) comes back as the answer's origin time.
fn request(nonce: [u8; 8]) -> [u8; NTP_PACKET_BYTES] {
    let mut packet = [0; NTP_PACKET_BYTES];
    packet[0] = 0b00_100_011;
    packet[40..].copy_from_slice(&nonce);
    packet
}

/// The transmit time (at 40, big-endian: seconds, then the fraction of a second in 2^-32) of a server's answer to `nonce`.
fn read(packet: &[u8], nonce: [u8; 8]) -> Option<SystemTime> {
    const MODE: u8 = 0b111;
    const SERVER: u8 = 4;
    let packet: &[u8; NTP_PACKET_BYTES] = packet.first_chunk()?;
    // Stratum 0 is no time, but a message that there is none.
    if packet[0] & MODE != SERVER || packet[1] == 0 || packet[24..32] != nonce {
        return None;
    }
    let seconds = u64::from(u32::from_be_bytes(*packet[40..44].first_chunk()?));
    let fraction = u64::from(u32::from_be_bytes(*packet[44..48].first_chunk()?));
    let seconds = match seconds.checked_sub(NTP_UNIX_OFFSET_SEC) {
        Some(seconds) => seconds,
        // The era that begins in 2036.
        None => seconds + ERA - NTP_UNIX_OFFSET_SEC,
    };
    let nanos = (fraction * 1_000_000_000) >> 32;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds) + Duration::from_nanos(nanos))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(nonce: [u8; 8], seconds: u32, fraction: u32) -> [u8; NTP_PACKET_BYTES] {
        let mut packet = [0; NTP_PACKET_BYTES];
        packet[0] = 0b00_100_100;
        packet[1] = 10;
        packet[24..32].copy_from_slice(&nonce);
        packet[40..44].copy_from_slice(&seconds.to_be_bytes());
        packet[44..].copy_from_slice(&fraction.to_be_bytes());
        packet
    }

    #[test]
    fn an_answer_tells_the_time_before_and_after_2036() {
        let nonce = *b"12345678";
        let time = |seconds, fraction| read(&answer(nonce, seconds, fraction), nonce);
        let unix = |millis| Some(UNIX_EPOCH + Duration::from_millis(millis));
        assert_eq!(time(2_208_988_800, 0), unix(0));
        assert_eq!(time(2_208_988_801, 1 << 31), unix(1500));
        assert_eq!(time(0, 0), unix(2_085_978_496_000));
    }

    #[test]
    fn what_is_no_answer_to_this_request_is_ignored() {
        let nonce = *b"12345678";
        let good = answer(nonce, 3_900_000_000, 0);
        assert!(read(&good, nonce).is_some());
        assert!(read(&good, *b"12345679").is_none());
        assert!(read(&good[..47], nonce).is_none());
        for (at, byte) in [(0, 0b00_100_011), (1, 0)] {
            let mut bad = good;
            bad[at] = byte;
            assert!(read(&bad, nonce).is_none());
        }
    }

    #[test]
    fn a_server_is_asked_and_believed() {
        let server = UdpSocket::bind("127.0.0.1:0").expect("bound");
        let address = server.local_addr().expect("an address");
        let asked = std::thread::spawn(move || ask(address));
        let mut packet = [0; 100];
        let (length, client) = server.recv_from(&mut packet).expect("a request");
        assert_eq!(length, NTP_PACKET_BYTES);
        let nonce = *packet[40..48].first_chunk().expect("8 bytes");
        let reply = answer(nonce, 2_208_988_800 + 1_000_000, 0);
        server.send_to(&reply, client).expect("sent");
        let told = asked.join().expect("no panic").expect("a time");
        let after = told.duration_since(UNIX_EPOCH + Duration::from_secs(1_000_000));
        assert!(after.expect("not before") < DEADLINE);
    }

    #[test]
    fn a_server_that_says_nothing_is_given_up() {
        let silent = UdpSocket::bind("127.0.0.1:0").expect("bound");
        let address = silent.local_addr().expect("an address");
        assert!(ask(address).is_err());
    }

    proptest! {
        #[test]
        fn no_packet_panics(packet in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = read(&packet, [0; 8]);
        }
    }
}
