//! Errors of a supervisor.

use std::{error::Error as _, io, path::PathBuf};

use wrenn_proto::supervise::RejectionCode;

/// Reason why a supervisor ended without a stop request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SupervisorError {
    /// A file cannot be read.
    #[error("failed to read {path}")]
    ReadSpec {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// `spec.json` is invalid.
    #[error("invalid sandbox specification {path}")]
    ParseSpec {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: serde_json::Error,
    },
    /// A step failed.
    #[error("failed to {step}")]
    Io {
        /// Step that failed.
        step: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The preload library for the VMM is missing.
    #[error("no preload library at {beside} or {installed}; reinstall or rebuild wrenn")]
    NoPreload {
        /// First path that was searched.
        beside: PathBuf,
        /// Second path that was searched.
        installed: PathBuf,
    },
    /// A file cannot be written.
    #[error("failed to write {path}")]
    Write {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The memory header of the snapshot is damaged.
    #[error("memory header {path} is damaged")]
    Header {
        /// Path of the file.
        path: PathBuf,
        /// Position and kind of the damage.
        #[source]
        source: wrenn_snapshot::HeaderError,
    },
    /// A file of the snapshot is unusable. The message names the file.
    #[error(transparent)]
    Chain(#[from] wrenn_snapshot::ChainError),
    /// The object store of the snapshot cannot be used.
    #[error(transparent)]
    Store(#[from] wrenn_store::StoreError),
    /// The changed memory cannot be written.
    #[error(transparent)]
    Diff(#[from] wrenn_snapshot::DiffError),
    /// The changed memory cannot be determined or read.
    #[error(transparent)]
    Dirty(#[from] wrenn_pager::dirty::DirtyError),
    /// The memory that the VMM saved cannot be read.
    #[error(transparent)]
    SavedMemory(#[from] wrenn_pager::sparse::SparseError),
    /// The memory size of the snapshot differs from the memory size of the sandbox.
    #[error("the snapshot has {snapshot} bytes of memory, expected {expected}")]
    MemorySize {
        /// Memory size of the snapshot, in bytes.
        snapshot: u64,
        /// Memory size of the sandbox, in bytes.
        expected: u64,
    },
    /// The snapshot id is invalid.
    #[error("invalid snapshot id `{0}`")]
    Build(String),
    /// The VMM did not map guest memory as one region of the expected size.
    #[error("the VMM did not map guest memory as one region")]
    Layout,
    /// The VMM did not report the location of guest memory.
    #[error("failed to receive guest memory from the VMM")]
    Handshake(#[from] wrenn_pager::HandshakeError),
    /// The page server did not start.
    #[error("failed to start the page server")]
    PageServer(#[from] wrenn_pager::StartError),
    /// The page server failed, so the VM was killed.
    #[error("failed to serve guest memory: {0}")]
    Pages(String),
    /// The VMM cannot load the device state, because another series of releases saved it.
    #[error("the snapshot was made with {made}, but this host has {here}")]
    OtherVmm {
        /// Kind and version of the VMM that saved the state.
        made: String,
        /// Kind and version of the VMM that was started.
        here: String,
    },
    /// The saved CPU and device state is unusable.
    #[error("failed to load {path}, which is damaged or from an incompatible VM")]
    DeviceState {
        /// Path of the file.
        path: PathBuf,
        /// Error reported by the VMM.
        #[source]
        source: wrenn_vmm::ControlError,
    },
    /// The VMM failed to execute a command.
    #[error(transparent)]
    Control(#[from] wrenn_vmm::ControlError),
    /// The disk cannot be presented to the VMM.
    #[error("failed to export the sandbox's disk")]
    Disk(#[from] wrenn_disk::DiskError),
    /// The process that presented the disk to the VMM ended, so the VM was killed.
    #[error("the exporter of the sandbox's disk ended: {0}")]
    DiskExport(wrenn_disk::DiskError),
    /// The VM may write to either of two files, so it was killed.
    #[error("the exporter of the sandbox's disk did not switch to a new file in time")]
    DiskUndecided,
    /// A task of the supervisor panicked.
    #[error("internal error of the supervisor; see `supervisor.log`")]
    Panicked,
    /// The VM did not start.
    #[error("failed to start the VM")]
    Launch(#[from] wrenn_vmm::LaunchError),
    /// The VM did not stop.
    #[error("failed to stop the VM")]
    Stop(#[from] wrenn_vmm::StopError),
    /// The VM ended by itself.
    #[error("{0}")]
    Ended(wrenn_vmm::MachineExit),
}

impl SupervisorError {
    /// Returns a closure for `map_err` that adds the failed step.
    pub(crate) fn io(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { step, source }
    }

    /// Returns the code of the reply to a request that failed with this error.
    pub(crate) fn rejection_code(&self) -> RejectionCode {
        let out_of_space = match self {
            Self::Control(error) => error.is_out_of_space(),
            Self::Disk(error) => error.is_out_of_space(),
            other => is_out_of_space(other),
        };
        match out_of_space {
            true => RejectionCode::OutOfSpace,
            false => RejectionCode::Other,
        }
    }
}

/// True if a cause of the error is a system call that failed because a disk is full or a quota is
/// used up.
fn is_out_of_space(error: &SupervisorError) -> bool {
    let causes = std::iter::successors(error.source(), |&error| error.source());
    causes
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .any(|error| {
            matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disk_has_its_code_at_every_step() {
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let rejected = |reason: &str| wrenn_vmm::ControlError::Rejected {
            command: "blockdev-snapshot",
            reason: reason.to_owned(),
        };
        let path = PathBuf::from("/x");
        for (error, expected) in [
            (
                SupervisorError::io("write")(full()),
                RejectionCode::OutOfSpace,
            ),
            (
                wrenn_snapshot::DiffError::Write {
                    path,
                    source: full(),
                }
                .into(),
                RejectionCode::OutOfSpace,
            ),
            (
                rejected("Could not write: No space left on device").into(),
                RejectionCode::OutOfSpace,
            ),
            (rejected("no such node").into(), RejectionCode::Other),
            (
                SupervisorError::io("write")(io::ErrorKind::PermissionDenied.into()),
                RejectionCode::Other,
            ),
            (SupervisorError::Layout, RejectionCode::Other),
        ] {
            assert_eq!(error.rejection_code(), expected, "{error:?}");
        }
    }
}
