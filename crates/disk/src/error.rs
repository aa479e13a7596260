//! Failure to create or merge a disk.

use std::{io, path::PathBuf, time::Duration};

use crate::HeaderError;

/// Failure to create or merge a disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// A file operation failed.
    #[error("failed to {step} the sandbox's disk")]
    Io {
        /// Attempted operation.
        step: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A program could not be started.
    #[error("failed to run `{program}` (package {package})")]
    Run {
        /// Name of the program.
        program: &'static str,
        /// Debian package of the program.
        package: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A program failed. The text is what it reported.
    #[error("`{0}` failed: {1}")]
    Failed(&'static str, String),
    /// A program did not finish in time.
    #[error("`{program}` timed out after {deadline:?}")]
    Deadline {
        /// Name of the program.
        program: &'static str,
        /// Deadline that passed.
        deadline: Duration,
    },
    /// A layer does not have the form that this crate and a VM's VMM write. It is not opened.
    #[error("disk layer {path} is rejected: {source}")]
    Layer {
        /// Path of the layer.
        path: PathBuf,
        /// Defect of its header.
        source: HeaderError,
    },
}

impl DiskError {
    /// True if the host's disk is full.
    #[must_use]
    pub fn is_out_of_space(&self) -> bool {
        match self {
            Self::Io { source, .. } | Self::Run { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ),
            Self::Failed(_, text) => wrenn_qmp::is_out_of_space(text),
            Self::Deadline { .. } | Self::Layer { .. } => false,
        }
    }
}

pub(crate) fn failed(step: &'static str) -> impl FnOnce(io::Error) -> DiskError {
    move |source| DiskError::Io { step, source }
}
