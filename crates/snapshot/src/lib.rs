//! Snapshots of VMs on disk.
//!
//! A [`Header`] describes the memory of a VM: it maps every page to one of several generations of
//! diff files, or to zeros. [`Chain`] reads memory through a header, [`DiffWriter`] writes the next
//! generation, and [`merge_files`] bounds the number of files. A [`Store`] holds the files of many
//! snapshots and removes the files that no snapshot depends on any more.
//!
//! This crate has no knowledge of VMs, VMMs or processes. Files appear atomically (written under
//! another name, flushed, renamed) and are never changed afterwards. All data is checked when it is
//! read: a damaged file is reported as an error with its path and the position of the defect.
//!
//! Format ([`header`]), files ([`store`]) and policy (the caller decides which snapshots to keep)
//! are separate, so that other storage locations, page sizes and memory sizes can be added.
#![forbid(unsafe_code)]

mod chain;
mod compatibility;
mod diff;
pub mod header;
mod id;
pub mod layout;
mod manifest;
mod mapping;
mod merge;
pub mod store;
mod working_set;

pub use chain::{Chain, ChainError, Diff, OpenRemote};
pub use compatibility::{HostVmms, Incompatible, InstalledVmm};
pub use diff::{DiffError, DiffStats, DiffWriter};
pub use header::{DiffFile, Header, HeaderError};
pub use id::{ParseSnapshotIdError, SnapshotId};
pub use manifest::{ImageFile, Layer, Manifest, ManifestError, Requirements, VmmVersion};
pub use mapping::{Mapping, Source, lookup, normalise, overlay};
pub use merge::merge_files;
pub use store::{Earlier, NewLayer, Snapshot, Staging, Store, StoreError, verify_layer};
pub use working_set::{WorkingSet, WorkingSetError};

/// Page size, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// True if all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Compares chunks of 16 bytes, which the compiler turns into vector instructions.
    let words = bytes.chunks_exact(16);
    words.remainder().iter().all(|byte| *byte == 0) && words.into_iter().all(|word| word == [0; 16])
}
