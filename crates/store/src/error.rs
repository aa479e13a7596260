//! Failures of stores.

use std::{io, path::PathBuf};

use crate::ArtifactId;

/// Reason why an operation of a store failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The artifact does not exist.
    #[error("artifact {0} does not exist")]
    NotFound(ArtifactId),
    /// The content differs from the checksums.
    #[error("chunk {chunk} of artifact {id} is damaged: checksum mismatch")]
    Damaged {
        /// Artifact.
        id: ArtifactId,
        /// Number of the chunk; the first is 0.
        chunk: u64,
    },
    /// A file system operation failed.
    #[error("failed to {step} {path}")]
    Io {
        /// Attempted operation, as a verb.
        step: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
        /// Error returned by the file system.
        #[source]
        source: io::Error,
    },
    /// The content of an artifact could not be read.
    #[error("failed to read artifact {id}")]
    Read {
        /// Artifact.
        id: ArtifactId,
        /// Error returned by the source.
        #[source]
        source: io::Error,
    },
    /// A request to the object store failed.
    #[error("failed to {step} in the object store")]
    Remote {
        /// Attempted operation, with its object.
        step: String,
        /// Error of the client.
        #[source]
        source: object_store::Error,
    },
    /// The settings of the object store are not valid.
    #[error("invalid setting of the object store: {0}")]
    Setting(String),
}

impl StoreError {
    pub(crate) fn io(step: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { step, path, source }
    }
}
