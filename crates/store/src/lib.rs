//! Immutable artifacts, addressed by id: parts of snapshots, kernels and root file systems.
//!
//! An [`Artifact`] is an id with the length of the content and a checksum of each chunk. Its place is
//! not part of it. An [`ArtifactStore`] has the content: [`LocalStore`] in a directory,
//! [`RemoteStore`] in an object store such as S3. A reader of the object store loads only the chunks
//! that it touches, through a [`Cache`] on the host's disk that all processes of the host share.
//! Every chunk is verified before it is used.
//!
//! This crate has no knowledge of VMs and of the meaning of artifacts.
#![forbid(unsafe_code)]

mod artifact;
mod cache;
mod content;
mod error;
mod local;
mod read_at;
mod remote;

pub use artifact::{Artifact, ArtifactId, Kind, ParseArtifactIdError};
pub use cache::Cache;
pub use content::{CHUNK_BYTES, Content, ContentHasher, ParseContentError};
pub use error::StoreError;
pub use local::{LocalStore, write_file};
pub use read_at::ReadAt;
pub use remote::{RemoteSettings, RemoteStore};

/// Store of artifacts.
///
/// All methods block until they are done.
pub trait ArtifactStore: Send + Sync {
    /// Opens an artifact for reading.
    ///
    /// # Errors
    /// `NotFound`, or the file cannot be opened. An artifact of an object store is looked for, loaded
    /// and verified when it is read.
    fn open(&self, artifact: &Artifact) -> Result<Box<dyn ReadAt>, StoreError>;

    /// Adds an artifact. An artifact that exists is kept: equal ids mean equal content.
    ///
    /// # Errors
    /// `Damaged` if the content does not match the checksums, or the store cannot be written to. The
    /// artifact does not exist then.
    fn put(&self, artifact: &Artifact, content: &dyn ReadAt) -> Result<(), StoreError>;

    /// True if the artifact exists.
    ///
    /// # Errors
    /// The store cannot be reached.
    fn contains(&self, id: &ArtifactId) -> Result<bool, StoreError>;

    /// Removes an artifact. Returns false if it does not exist.
    ///
    /// # Errors
    /// The store cannot be reached or written to.
    fn remove(&self, id: &ArtifactId) -> Result<bool, StoreError>;

    /// Returns the ids of all artifacts of a kind.
    ///
    /// # Errors
    /// The store cannot be reached.
    fn list(&self, kind: Kind) -> Result<Vec<ArtifactId>, StoreError>;
}
