//! Why the control plane cannot run.

use std::{io, net::SocketAddr, path::PathBuf};

use crate::db::DbError;

/// Why [`serve`](crate::serve) ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The address is taken or not ours.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The database cannot be opened or brought up to date.
    #[error("cannot use the database")]
    Database(#[from] DbError),
    /// The agent's URL is not one.
    #[error(
        "`{url}` is not the URL of a host agent: expected something like http://127.0.0.1:50051"
    )]
    AgentUrl {
        /// What was given.
        url: String,
    },
    /// The agent's token cannot be sent in a header.
    #[error("the host agent's token holds characters that a header cannot carry")]
    AgentToken,
    /// The first API key cannot be written.
    #[error("cannot write the API key to {}", path.display())]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
