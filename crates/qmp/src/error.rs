//! Failures of a QMP call.

use std::{io, time::Duration};

/// Failure of a QMP call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// A system call failed.
    #[error("failed to use the QMP connection")]
    Io(#[from] io::Error),
    /// The peer closed the connection.
    #[error("the QMP connection was closed")]
    Closed,
    /// The peer sent something that is not QMP. The connection is no longer usable.
    #[error("invalid QMP message: {0}")]
    Malformed(&'static str),
    /// The peer rejected a command, or failed to execute it.
    #[error("`{command}` failed: {desc}")]
    Command {
        /// Name of the command.
        command: &'static str,
        /// Class of the error, such as `GenericError` or `DeviceNotFound`.
        class: String,
        /// Description by the peer, in English.
        desc: String,
    },
    /// The peer did not answer in time.
    #[error("the QMP peer timed out after {deadline:?} (step: {step})")]
    Deadline {
        /// Step that timed out.
        step: &'static str,
        /// Deadline that passed.
        deadline: Duration,
    },
}
