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

/// True if a message of one of QEMU's programs says that a disk is full or that a quota is used up.
///
/// QEMU's programs report an errno by its text in English (`strerror`) only, in QMP too: the class
/// of such an error is `GenericError`.
#[must_use]
pub fn is_out_of_space(message: &str) -> bool {
    ["No space left on device", "Disk quota exceeded"]
        .iter()
        .any(|text| message.contains(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_recognized_by_the_text_of_its_errno() {
        for full in [28, 122] {
            let text = io::Error::from_raw_os_error(full).to_string();
            assert!(
                is_out_of_space(&format!("Could not write: {text}")),
                "{text}"
            );
        }
        assert!(!is_out_of_space("Could not open: Permission denied"));
    }
}
