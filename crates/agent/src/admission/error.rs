//! Reasons why a sandbox is not admitted.

use std::io;

use wrenn_model::limits::MAX_FORK_COPIES;

use super::{free_disk::DISK_FLOOR_MIB, memory_reserve::MEMORY_RESERVE_MIB};
use crate::{network::ceiling::CeilingError, snapshots::SnapshotError, templates::TemplateError};

/// Reason why a sandbox is not admitted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum AdmissionError {
    /// A field of the request is invalid.
    #[error("`{field}`: {reason}")]
    Field { field: &'static str, reason: String },
    /// The value of a field is outside the limits of this host, regardless of its current load.
    #[error("`{field}`: {got} is out of range, expected {min} to {max}{why}")]
    OutOfRange {
        field: &'static str,
        got: u32,
        min: u32,
        max: u32,
        why: &'static str,
    },
    /// A fork has no copies, or too many.
    #[error("`copy_ids`: {got} copies requested, expected 1 to {MAX_FORK_COPIES}")]
    Copies { got: usize },
    /// The network access exceeds the operator's ceiling.
    #[error(transparent)]
    Egress(#[from] CeilingError),
    /// Not enough memory is available now.
    #[error(
        "not enough memory on the host for `memory_mb` {wanted_mib}: {available_mib} MiB of memory \
         are available, of which {MEMORY_RESERVE_MIB} MiB stay free"
    )]
    Memory { available_mib: u64, wanted_mib: u32 },
    /// Not enough disk space is free now.
    #[error(
        "not enough disk space on the host to create a sandbox: {free_mib} MiB are free, \
         {DISK_FLOOR_MIB} MiB are required"
    )]
    Disk { free_mib: u64 },
    /// The template does not exist, or cannot be read.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The snapshot cannot be used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The properties of the host cannot be read.
    #[error("failed to read the capacity of this host")]
    Capacity(#[source] io::Error),
}

/// Rejects a value outside a range.
pub(super) fn in_range(
    field: &'static str,
    got: u32,
    min: u32,
    max: u32,
    why: &'static str,
) -> Result<(), AdmissionError> {
    if (min..=max).contains(&got) {
        return Ok(());
    }
    Err(AdmissionError::OutOfRange {
        field,
        got,
        min,
        max,
        why,
    })
}
