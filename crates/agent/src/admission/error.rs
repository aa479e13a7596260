//! Reasons why a sandbox is not admitted.

use std::io;

use wrenn_model::limits::MAX_FORK_COPIES;

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
         are available, of which {reserve_mib} MiB stay free, and sandboxes that are starting need \
         {starting_mib} MiB; try again later"
    )]
    Memory {
        available_mib: u64,
        reserve_mib: u64,
        starting_mib: u64,
        wanted_mib: u32,
    },
    /// The host's memory is promised to other sandboxes.
    #[error(
        "the host's memory is promised to other sandboxes: {promised_mib} of {limit_mib} MiB, which \
         leaves too little for `memory_mb` {wanted_mib}; pause or destroy sandboxes, or raise \
         WRENN_MEMORY_COMMIT_PERCENT"
    )]
    Promised {
        promised_mib: u64,
        limit_mib: u64,
        wanted_mib: u32,
    },
    /// Not enough disk space is free now.
    #[error(
        "not enough disk space on the host: {free_mib} MiB are free, {required_mib} MiB are required; \
         destroy sandboxes or snapshots, or lower WRENN_DISK_RESERVE_MB"
    )]
    Disk { free_mib: u64, required_mib: u64 },
    /// All sandboxes together have used up the disk space that they may use.
    #[error(
        "the sandboxes and snapshots of this host use {used_mib} of {budget_mib} MiB of disk space; \
         destroy some, or raise WRENN_DISK_BUDGET_MB"
    )]
    DiskBudget { used_mib: u64, budget_mib: u64 },
    /// The sandbox has used up the disk space that it may use.
    #[error(
        "the files of the sandbox use {used_mib} of {budget_mib} MiB of disk space; pause it, which \
         compacts them, or raise WRENN_SANDBOX_DISK_BUDGET_MB"
    )]
    SandboxBudget { used_mib: u64, budget_mib: u64 },
    /// The requested disk is larger than a sandbox may use.
    #[error(
        "`disk_size_mb`: {disk_mib} exceeds the disk space of a sandbox, {budget_mib} MiB \
         (WRENN_SANDBOX_DISK_BUDGET_MB)"
    )]
    DiskSize { disk_mib: u32, budget_mib: u64 },
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
