//! Generation of the packet filter: a number that changes with every change of its rules, in the
//! network namespace of the calling thread.
//!
//! Reading it costs some microseconds, so changes can be detected without listing the rules. The
//! message is `NFT_MSG_GETGEN` of `linux/netfilter/nf_tables.h`; integers of netlink are in host
//! byte order, those of nftables in network byte order:
//!
//! | off | size | field of the request                          | field of the reply             |
//! |-----|------|-----------------------------------------------|--------------------------------|
//! |   0 |    4 | length: 20                                    | length                         |
//! |   4 |    2 | type: subsystem 10 (nftables), message 16     | subsystem 10, message 15       |
//! |   6 |    2 | flags: 1 (request)                            | -                              |
//! |   8 |    8 | sequence number, port                         | -                              |
//! |  16 |    4 | family, version, resource                     | -                              |
//! |  20 |      |                                               | attributes; 1 is the number    |

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

const GET_GENERATION: u16 = 10 << 8 | 16;
const NEW_GENERATION: u16 = 10 << 8 | 15;
const REQUEST: u16 = 1;
const GENERATION_ID: u16 = 1;

/// Bytes before the attributes of a message.
const HEAD_BYTES: usize = 20;

/// Returns the current generation.
pub(super) fn current() -> io::Result<u32> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut request = Vec::with_capacity(HEAD_BYTES);
    request.extend(20_u32.to_ne_bytes());
    request.extend(GET_GENERATION.to_ne_bytes());
    request.extend(REQUEST.to_ne_bytes());
    request.extend([0; 12]);
    socket.send(&request, 0)?;
    let (reply, _) = socket.recv_from_full()?;
    parse(&reply).ok_or_else(|| io::Error::other("the kernel did not return a generation"))
}

/// Returns the number in a reply.
fn parse(reply: &[u8]) -> Option<u32> {
    let kind = reply.get(4..6)?.try_into().ok()?;
    if u16::from_ne_bytes(kind) != NEW_GENERATION {
        return None;
    }
    let mut rest = reply.get(HEAD_BYTES..)?;
    while let Some((head, _)) = rest.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        if u16::from_ne_bytes([head[2], head[3]]) == GENERATION_ID {
            let number = rest.get(4..8)?.try_into().ok()?;
            return Some(u32::from_be_bytes(number));
        }
        // Attributes are aligned to four bytes.
        rest = rest.get(length.max(4).next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::private_host::{self, run};
    use proptest::prelude::*;

    #[test]
    fn the_number_changes_with_each_change_of_the_rules_and_only_then() {
        private_host::enter();
        let first = current().unwrap();
        assert_eq!(current().unwrap(), first);
        run("nft", &["add", "table", "inet", "other"]);
        let second = current().unwrap();
        assert_ne!(second, first);
        run("nft", &["list", "ruleset"]);
        assert_eq!(current().unwrap(), second);
    }

    proptest! {
        #[test]
        fn any_reply_is_parsed_or_ignored(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let mut reply = bytes;
            if reply.len() > 6 {
                reply[4..6].copy_from_slice(&NEW_GENERATION.to_ne_bytes());
            }
            let _ = parse(&reply);
        }
    }
}
