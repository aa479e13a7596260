//! Failures to start or run the control plane.

use std::{io, net::SocketAddr, path::PathBuf};

use wrenn_db::DbError;

/// Reason why the control plane ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The address is in use, or does not belong to this machine.
    #[error("failed to listen on {address}")]
    Listen {
        /// Address.
        address: SocketAddr,
        /// Cause.
        source: io::Error,
    },
    /// The database cannot be opened or migrated.
    #[error("failed to open or migrate the database")]
    Database(#[from] DbError),
    /// The agent's URL is invalid.
    #[error(
        "`{url}` is not a valid URL of a host agent, expected for example http://127.0.0.1:50051"
    )]
    AgentUrl {
        /// Configured URL.
        url: String,
    },
    /// The agent's token cannot be sent in a header.
    #[error("the host agent's token contains characters that are not allowed in an HTTP header")]
    AgentToken,
    /// The first API key cannot be written.
    #[error("failed to write the API key to {}", path.display())]
    KeyFile {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}
