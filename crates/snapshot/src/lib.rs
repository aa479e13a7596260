//! Frozen moments of machines on disk.
//!
//! The memory of a machine is described by a [`Header`], which maps every page to one of several generations of diff files, or
//! to zeros; [`Chain`] reads through it, [`DiffWriter`] makes the next generation, [`merge_files`] bounds their number. A
//! [`Store`] holds all that belongs to many moments, and gives back what nobody stands on any more.
//!
//! Knows no machine, no VMM and no process. Files appear whole (written under another name, flushed, renamed) and are never
//! changed afterwards. What is read is checked: a damaged file is an error that names it and says where.
//!
//! Format ([`header`]), files ([`store`]) and policy (what to keep: the caller's) are apart, so that other places, page sizes and
//! memory sizes can come.
#![forbid(unsafe_code)]

mod build;
mod chain;
mod diff;
pub mod header;
pub mod layout;
mod manifest;
mod mapping;
mod merge;
pub mod store;
mod working_set;

pub use build::{BuildId, NotABuildId};
pub use chain::{Chain, ChainError, Diff};
pub use diff::{DiffError, DiffStats, DiffWriter};
pub use header::{DiffFile, Header, HeaderError};
pub use manifest::{Manifest, ManifestError};
pub use mapping::{Mapping, Source, lookup, normalise, overlay};
pub use merge::merge_files;
pub use store::{Snapshot, Staging, Store, StoreError};
pub use working_set::{WorkingSet, WorkingSetError};

/// Size of a page, bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Whether there is nothing but zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // In words of 16 bytes, which the compiler turns into vector instructions.
    let words = bytes.chunks_exact(16);
    words.remainder().iter().all(|byte| *byte == 0) && words.into_iter().all(|word| word == [0; 16])
}
