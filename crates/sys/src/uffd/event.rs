//! Events read from a userfaultfd.

use std::io;

/// Size of one message, in bytes.
pub const MESSAGE_BYTES: usize = 32;
/// Maximum number of events read at once.
pub const MAX_BATCH: usize = 16;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;
const FLAG_WRITE_PROTECTED: u64 = 1 << 1;
const FLAG_MINOR: u64 = 1 << 2;

/// Event in a registered mapping. Addresses are those of the process that has the mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A thread waits for a page.
    Fault {
        /// Address of the page, or an address inside of it.
        address: u64,
        /// True if the page is missing. False means another kind of fault, which was not requested.
        missing: bool,
    },
    /// A range was discarded and reads as zeros from now on.
    Remove {
        /// First address.
        start: u64,
        /// Address after the last byte.
        end: u64,
    },
}

impl Event {
    /// Decodes one message of the kernel, in the machine's byte order.
    ///
    /// | off | size | field                                         |
    /// |   0 |    1 | event                                         |
    /// |   8 |    8 | flags of a fault, or start of a removed range |
    /// |  16 |    8 | address of a fault, or end of a removed range |
    ///
    /// # Errors
    /// Fails if the message is too short, or the event was not requested.
    pub fn decode(message: &[u8]) -> io::Result<Self> {
        let word = |at: usize| {
            message
                .get(at..at + 8)
                .and_then(|bytes| bytes.try_into().ok())
                .map(u64::from_ne_bytes)
                .ok_or(io::ErrorKind::UnexpectedEof)
        };
        match message.first() {
            Some(&EVENT_PAGEFAULT) => Ok(Self::Fault {
                missing: word(8)? & (FLAG_WRITE_PROTECTED | FLAG_MINOR) == 0,
                address: word(16)?,
            }),
            Some(&EVENT_REMOVE) => Ok(Self::Remove {
                start: word(8)?,
                end: word(16)?,
            }),
            Some(other) => Err(io::Error::other(format!(
                "unexpected userfaultfd event {other:#x}"
            ))),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(event: u8, first: u64, second: u64) -> Vec<u8> {
        let mut bytes = vec![event, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend(first.to_ne_bytes());
        bytes.extend(second.to_ne_bytes());
        bytes.resize(MESSAGE_BYTES, 0);
        bytes
    }

    #[test]
    fn messages_are_decoded() {
        let fault = |first| Event::decode(&message(0x12, first, 0x7000)).expect("is one");
        assert_eq!(
            fault(1),
            Event::Fault {
                address: 0x7000,
                missing: true
            }
        );
        assert_eq!(
            fault(2),
            Event::Fault {
                address: 0x7000,
                missing: false
            }
        );
        assert_eq!(
            Event::decode(&message(0x15, 0x1000, 0x3000)).expect("is one"),
            Event::Remove {
                start: 0x1000,
                end: 0x3000
            }
        );
    }

    #[test]
    fn other_messages_are_errors() {
        let error = Event::decode(&message(0x13, 0, 0)).expect_err("was not asked for");
        assert!(error.to_string().contains("0x13"), "{error}");
        assert!(Event::decode(&[0x12, 0, 0]).is_err());
        assert!(Event::decode(&[]).is_err());
    }
}
