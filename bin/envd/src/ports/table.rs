//! Listeners in `/proc/net/tcp` and `/proc/net/tcp6`.
//!
//! Each line is one socket. Fields are separated by spaces. The kernel lists all listeners before
//! all connections (`Documentation/networking/proc_net_tcp.rst`), so a reader may stop at the first
//! line that is not a listener.
//!
//! | field | content                                                                        |
//! |------:|--------------------------------------------------------------------------------|
//! |     0 | line number and a colon                                                        |
//! |     1 | local address and port in hexadecimal; the address is a sequence of 32-bit     |
//! |       | words, each in native byte order                                               |
//! |     2 | remote address and port                                                        |
//! |     3 | state in hexadecimal; `0A` is LISTEN                                           |
//! |   4-8 | queues, timers, retransmissions, user id, timeout                              |
//! |     9 | inode                                                                          |

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// `TCP_LISTEN` of the kernel's `net/tcp_states.h`, as the kernel prints it.
const LISTEN: &[u8] = b"0A";

/// Listening socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener {
    /// Bound address.
    pub address: IpAddr,
    /// Bound port.
    pub port: u16,
    /// Inode of the socket. Another inode means another socket, even on the same port.
    pub inode: u64,
}

/// Content of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    /// A listener.
    Listener(Listener),
    /// A connection: no listener follows.
    Connection,
    /// The heading, or a line that cannot be parsed.
    Other,
}

/// Parses a line.
#[must_use]
pub fn parse_line(line: &[u8]) -> Line {
    parse(line).unwrap_or(Line::Other)
}

fn parse(line: &[u8]) -> Option<Line> {
    let mut fields = line
        .split(|byte| *byte == b' ')
        .filter(|field| !field.is_empty());
    let number = fields.next()?.strip_suffix(b":")?;
    if !number.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let local = fields.next()?;
    let state = fields.nth(1)?;
    if state != LISTEN {
        return Some(Line::Connection);
    }
    let colon = local.iter().position(|byte| *byte == b':')?;
    let (address, port) = (local.get(..colon)?, local.get(colon + 1..)?);
    if port.len() != 4 {
        return None;
    }
    Some(Line::Listener(Listener {
        address: parse_address(address)?,
        port: u16::try_from(hexadecimal(port)?).ok()?,
        inode: decimal(fields.nth(5)?)?,
    }))
}

fn parse_address(text: &[u8]) -> Option<IpAddr> {
    match text.len() {
        8 => Some(IpAddr::V4(Ipv4Addr::from(word(text)?))),
        32 => {
            let mut bytes = [0; 16];
            for (place, text) in bytes.chunks_exact_mut(4).zip(text.chunks_exact(8)) {
                place.copy_from_slice(&word(text)?);
            }
            // A listener on an IPv4-mapped address listens for IPv4.
            Some(Ipv6Addr::from(bytes).to_canonical())
        }
        _ => None,
    }
}

/// Returns four bytes of an address, in network byte order.
fn word(text: &[u8]) -> Option<[u8; 4]> {
    Some(hexadecimal(text)?.to_ne_bytes())
}

fn hexadecimal(text: &[u8]) -> Option<u32> {
    text.iter().try_fold(0_u32, |number, byte| {
        let digit = char::from(*byte).to_digit(16)?;
        number.checked_mul(16)?.checked_add(digit)
    })
}

fn decimal(text: &[u8]) -> Option<u64> {
    text.iter().try_fold(0_u64, |number, byte| {
        let digit = char::from(*byte).to_digit(10)?;
        number.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn listener(address: &str, port: u16, inode: u64) -> Line {
        Line::Listener(Listener {
            address: address.parse().expect("an address"),
            port,
            inode,
        })
    }

    #[test]
    fn lines_of_both_tables_are_understood() {
        let heading =
            b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt";
        assert_eq!(parse_line(heading), Line::Other);
        let line = b"   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 126 1 0000000090febf72 100 0 0 10 0";
        assert_eq!(parse_line(line), listener("127.0.0.1", 8080, 126));
        let line = b"   1: 06000C0A:B4CA 03000B0A:C33F 06 00000000:00000000 03:00000CDD 00000000     0        0 0 3 00000000c1aaefb7";
        assert_eq!(parse_line(line), Line::Connection);
        let line = b"  10: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 77 1";
        assert_eq!(parse_line(line), listener("::1", 80, 77));
        let line = b"  11: 0000000000000000FFFF00000100007F:0050 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 78 1";
        assert_eq!(parse_line(line), listener("127.0.0.1", 80, 78));
    }

    #[test]
    fn this_kernels_table_lists_listeners_first() {
        let server = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("bound");
        let address = server.local_addr().expect("bound");
        let _connection = std::net::TcpStream::connect(address).expect("connected");
        let table = std::fs::read("/proc/net/tcp").expect("readable");
        let kinds: Vec<Line> = table.split(|b| *b == b'\n').map(parse_line).collect();
        let first_connection = kinds.iter().position(|line| *line == Line::Connection);
        let last_listener = kinds
            .iter()
            .rposition(|line| matches!(line, Line::Listener(_)));
        assert!(last_listener.is_some() && last_listener < first_connection);
        assert!(kinds.iter().any(
            |line| matches!(line, Line::Listener(one) if one.port == address.port() && one.inode > 0)
        ));
    }

    proptest! {
        #[test]
        fn no_line_makes_the_parser_panic(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_line(&line);
        }

        #[test]
        fn what_is_printed_is_read_back(octets: [u8; 4], port: u16, inode: u64) {
            let line = format!(
                "   7: {:08X}:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 {inode} 1",
                u32::from_ne_bytes(octets)
            );
            let address = IpAddr::from(octets);
            prop_assert_eq!(parse_line(line.as_bytes()), Line::Listener(Listener { address, port, inode }));
        }
    }
}
