//! Client for QMP, the control protocol of QEMU and of `qemu-storage-daemon`: one JSON object per
//! line. Source: QEMU's `docs/interop/qmp-spec.txt`.
//!
//! [`Qmp`] owns the connection, and nothing of the process at its other end. Commands are sent one
//! at a time. Each command carries an id, and only the reply with this id answers it, so a reply
//! that arrives after the deadline of its command is discarded. Events may arrive at any time; they
//! are passed to the connection's [`Subscriber`] while a reply or an event is awaited, and are not
//! buffered.
//!
//! Every call to the peer belongs to a [`Session`], whose deadline bounds all its calls together.
//! Only [`Qmp::drain`] has no deadline: it waits for the end of the process.
//!
//! A call that is cancelled or times out leaves the connection usable. After a message that is not
//! QMP, or a closed connection, every later call fails.
#![forbid(unsafe_code)]

mod connection;
mod error;
mod message;
mod session;

pub use connection::{Qmp, Subscriber, socket_pair};
pub use error::{QmpError, is_out_of_space};
pub use message::{MAX_LINE_BYTES, Message, parse_message};
pub use session::{COMMAND_DEADLINE, Session};

#[cfg(test)]
mod tests;
