//! Correction of the guest's clock before a restored guest is reported as running.
//!
//! A restored guest's clock shows the time of its snapshot. For a template snapshot, the difference
//! is the age of the image. chronyd steps the clock within seconds, but the first commands of a
//! sandbox run before that. envd therefore asks the gateway for the time, in packets of RFC 5905
//! (SNTP), and steps the clock if it is off. A response may be wrong by half of its round-trip
//! time, so a slow response is requested again. The host does not set the guest's clock. All
//! failures are left to chronyd.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::time::{ClockId, Timespec, clock_settime};
use wrenn_proto::{
    guest::GATEWAY_IP,
    ntp::{
        PACKET_BYTES as NTP_PACKET_BYTES, PORT as NTP_PORT, UNIX_OFFSET_SEC as NTP_UNIX_OFFSET_SEC,
    },
};

/// Maximum time for all rounds. The gateway is a process on the same host.
const DEADLINE: Duration = Duration::from_millis(300);

/// Maximum number of requests.
const ROUNDS: usize = 3;

/// Round-trip time below which a response is accurate enough.
const QUICK: Duration = Duration::from_millis(20);

/// Maximum difference that is left to chronyd, which corrects it gradually.
const TOLERANCE: Duration = Duration::from_millis(100);

/// Number of seconds in an NTP era, after which NTP seconds start again at 0.
const ERA: u64 = 1 << 32;

/// Response of a time server.
#[derive(Debug, Clone, Copy)]
struct Reading {
    /// Correct time at the arrival of the response.
    time: SystemTime,
    /// Arrival of the response, by the monotonic clock.
    came: Instant,
    /// Time between request and response.
    round_trip: Duration,
}

impl Reading {
    /// Returns the correct time now.
    fn now(&self) -> SystemTime {
        self.time + self.came.elapsed()
    }

    /// True if a difference of `off` must be an error of the clock. False if the tolerance or the
    /// possible error of this reading covers the difference.
    fn is_reason(&self, off: Duration) -> bool {
        off > TOLERANCE.max(self.round_trip / 2)
    }
}

/// Steps the guest's clock to the gateway's, if the guest's clock is off.
///
/// # Errors
/// Fails if the gateway does not respond or the kernel rejects the new time.
pub fn step_to_gateway() -> io::Result<()> {
    let gateway = SocketAddr::from((GATEWAY_IP, NTP_PORT));
    let reading = best(|limit| ask(gateway, limit))?;
    let (right, now) = (reading.now(), SystemTime::now());
    let off = right
        .duration_since(now)
        .or_else(|_| now.duration_since(right));
    if !reading.is_reason(off.unwrap_or_default()) {
        return Ok(());
    }
    let since = right.duration_since(UNIX_EPOCH).map_err(io::Error::other)?;
    let time = Timespec {
        tv_sec: i64::try_from(since.as_secs()).map_err(io::Error::other)?,
        tv_nsec: since.subsec_nanos().into(),
    };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

/// Asks until a response is fast enough, at most [`ROUNDS`] times. Returns the fastest response.
fn best(mut ask: impl FnMut(Duration) -> io::Result<Reading>) -> io::Result<Reading> {
    let began = Instant::now();
    let mut best = ask(DEADLINE)?;
    for _ in 1..ROUNDS {
        let left = DEADLINE.saturating_sub(began.elapsed());
        if best.round_trip < QUICK || left.is_zero() {
            break;
        }
        match ask(left) {
            Ok(reading) if reading.round_trip < best.round_trip => best = reading,
            Ok(_) => {}
            // There is a response already.
            Err(_) => break,
        }
    }
    Ok(best)
}

/// Asks a server for the time.
fn ask(server: SocketAddr, limit: Duration) -> io::Result<Reading> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.set_read_timeout(Some(limit))?;
    socket.connect(server)?;
    // A random number instead of the guest's time, which the server need not know. Only the
    // response to this request repeats the number.
    let mut nonce = [0; 8];
    rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())?;
    let asked = Instant::now();
    socket.send(&request(nonce))?;
    let mut packet = [0; 512];
    let length = socket.recv(&mut packet)?;
    let came = Instant::now();
    let round_trip = came - asked;
    let sent = read(&packet[..length], nonce);
    let time = sent
        .and_then(|sent| sent.checked_add(round_trip / 2))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "invalid NTP response"))?;
    Ok(Reading {
        time,
        came,
        round_trip,
    })
}

/// Builds a client's packet: version 4, mode 3. The server returns its transmit time (at 40) as the
/// origin time of the response.
fn request(nonce: [u8; 8]) -> [u8; NTP_PACKET_BYTES] {
    let mut packet = [0; NTP_PACKET_BYTES];
    packet[0] = 0b00_100_011;
    packet[40..].copy_from_slice(&nonce);
    packet
}

/// Returns the transmit time (at 40, big-endian: seconds, then the fraction of a second in 2^-32)
/// of a server's response to `nonce`.
fn read(packet: &[u8], nonce: [u8; 8]) -> Option<SystemTime> {
    const MODE: u8 = 0b111;
    const SERVER: u8 = 4;
    let packet: &[u8; NTP_PACKET_BYTES] = packet.first_chunk()?;
    // Stratum 0 marks a message that the server has no time.
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
        let asked = std::thread::spawn(move || ask(address, DEADLINE));
        let mut packet = [0; 100];
        let (length, client) = server.recv_from(&mut packet).expect("a request");
        assert_eq!(length, NTP_PACKET_BYTES);
        let nonce = *packet[40..48].first_chunk().expect("8 bytes");
        let reply = answer(nonce, 2_208_988_800 + 1_000_000, 0);
        server.send_to(&reply, client).expect("sent");
        let told = asked.join().expect("no panic").expect("a time");
        let after = told
            .now()
            .duration_since(UNIX_EPOCH + Duration::from_secs(1_000_000));
        assert!(after.expect("not before") < DEADLINE);
        assert!(told.round_trip < DEADLINE);
    }

    #[test]
    fn a_server_that_says_nothing_is_given_up() {
        let silent = UdpSocket::bind("127.0.0.1:0").expect("bound");
        let address = silent.local_addr().expect("an address");
        assert!(ask(address, DEADLINE).is_err());
    }

    fn reading(millis: u64) -> io::Result<Reading> {
        Ok(Reading {
            time: UNIX_EPOCH,
            came: Instant::now(),
            round_trip: Duration::from_millis(millis),
        })
    }

    /// Returns the round trip of the chosen response and the number of requests. `answers` are
    /// round-trip times in milliseconds, in order; 0 is a failure.
    fn choice(answers: &[u64]) -> (Option<u128>, usize) {
        let mut asked = 0;
        let best = best(|_| {
            asked += 1;
            match answers[asked - 1] {
                0 => Err(io::ErrorKind::TimedOut.into()),
                millis => reading(millis),
            }
        });
        (best.ok().map(|b| b.round_trip.as_millis()), asked)
    }

    #[test]
    fn the_quickest_of_a_few_answers_counts_and_a_quick_one_at_once() {
        assert_eq!(choice(&[3]), (Some(3), 1));
        assert_eq!(choice(&[250, 19]), (Some(19), 2));
        assert_eq!(choice(&[80, 200, 30]), (Some(30), 3));
        assert_eq!(choice(&[80, 200, 90]), (Some(80), 3));
        assert_eq!(choice(&[80, 0]), (Some(80), 2));
        assert_eq!(choice(&[0]), (None, 1));
    }

    #[test]
    fn all_rounds_together_keep_the_deadline() {
        let began = Instant::now();
        let took = best(|limit| {
            std::thread::sleep(limit.min(Duration::from_millis(250)));
            reading(250)
        });
        assert!(took.is_ok());
        assert!(began.elapsed() < DEADLINE + Duration::from_millis(200));
    }

    #[test]
    fn a_clock_is_not_stepped_by_an_answer_that_may_be_as_wrong() {
        let wrong = |off, took| {
            let off = Duration::from_millis(off);
            reading(took).expect("a time").is_reason(off)
        };
        assert!(wrong(101, 10));
        assert!(!wrong(100, 10));
        assert!(!wrong(140, 290));
        assert!(wrong(150, 290));
    }

    proptest! {
        #[test]
        fn no_packet_panics(packet in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = read(&packet, [0; 8]);
        }
    }
}
