//! Errors of lifecycle operations on a sandbox.

use std::time::Duration;

use connectrpc::ConnectError;
use wrenn_disk::DiskError;
use wrenn_model::SandboxId;
use wrenn_snapshot::Incompatible;

use super::Stall;
use crate::{
    admission::AdmissionError,
    cgroup::CgroupError,
    network::{NetworkError, slot::SlotError},
    sandbox_dir::SandboxDirError,
    snapshots::SnapshotError,
    supervisor::SupervisorError,
};

/// Failure to create a sandbox.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum CreateError {
    /// The request is not admitted.
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A sandbox with this ID exists.
    #[error("sandbox {0} already exists")]
    Exists(SandboxId),
    #[error("failed to prepare the sandbox's directory")]
    SandboxDir(#[source] SandboxDirError),
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error("failed to create the sandbox's network")]
    Network(#[from] NetworkError),
    #[error("failed to limit the sandbox's resources")]
    Cgroup(#[from] CgroupError),
    #[error("failed to create the sandbox's disk")]
    Disk(#[from] DiskError),
    #[error("failed to start the sandbox's virtual machine")]
    Supervisor(#[source] SupervisorError),
    /// The VM started and then ended.
    #[error("the sandbox's virtual machine ended before its guest was ready: {0}")]
    Ended(String),
    /// The guest agent never answered.
    #[error("the sandbox's guest agent did not answer within {0:?}")]
    GuestSilent(Duration),
    /// The guest made no progress, in every attempt.
    #[error("the sandbox's guest did not boot")]
    Stalled(#[source] Stall),
    /// The guest agent rejected its settings.
    #[error("failed to configure the sandbox's guest agent")]
    Guest(#[source] ConnectError),
    /// A client destroyed the sandbox.
    #[error("the sandbox was destroyed while it was starting")]
    Destroyed,
    /// The agent is shutting down.
    #[error("the host agent is shutting down")]
    ShuttingDown,
    /// A task of the agent panicked.
    #[error("internal error of the host agent; see its log")]
    Panicked,
}

impl CreateError {
    /// True if the host's disk is full.
    pub(crate) fn is_out_of_space(&self) -> bool {
        match self {
            Self::SandboxDir(error) => error.is_out_of_space(),
            Self::Disk(error) => error.is_out_of_space(),
            Self::Slot(SlotError::Io { source, .. }) => crate::host::is_out_of_space(source),
            _ => false,
        }
    }
}

/// Failure to free a sandbox. The remaining resources stay recorded, and another destroy tries
/// again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum DestroyError {
    #[error("failed to stop the sandbox's virtual machine")]
    Supervisor(#[from] SupervisorError),
    #[error("failed to kill the sandbox's processes")]
    Cgroup(#[from] CgroupError),
    #[error("failed to remove the sandbox's network")]
    Network(#[from] NetworkError),
    #[error("failed to remove the sandbox's disk")]
    Disk(#[from] DiskError),
    #[error("failed to release the sandbox's network slot")]
    Slot(#[from] SlotError),
    #[error("failed to remove the sandbox's directory")]
    SandboxDir(#[from] SandboxDirError),
    /// A concurrent destroy of the same sandbox failed.
    #[error("{0}")]
    Again(String),
    /// The sandbox no longer exists, or the agent is about to exit.
    #[error("the sandbox no longer exists, or the host agent is shutting down")]
    Gone,
}

/// Failure to pause, resume or snapshot a sandbox, or to change its network access. The sandbox is
/// unchanged, unless its state says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum LifecycleError {
    /// The sandbox's state does not allow the operation.
    #[error("the sandbox is {0}")]
    NotNow(&'static str),
    /// The sandbox has no snapshot.
    #[error("the sandbox has no snapshot to resume from")]
    NoSnapshot,
    #[error("failed to prepare the guest for the snapshot; the sandbox keeps running")]
    Prepare(#[source] ConnectError),
    /// The guest agent answered neither the preparation nor health checks.
    #[error("the guest agent does not answer; the sandbox keeps running")]
    GuestSilent,
    /// A client destroys the sandbox, which aborts the operation.
    #[error("the sandbox is being destroyed")]
    Destroyed,
    #[error("failed to snapshot the virtual machine; the sandbox keeps running")]
    Snapshot(#[source] SupervisorError),
    /// The VMM reported a full disk, which the host's is not.
    #[error(
        "failed to snapshot the virtual machine, which reports a full disk, but the host's disk has space: {0}"
    )]
    NoShortage(String),
    #[error("failed to resume the virtual machine after the snapshot; the sandbox is lost")]
    ResumeVm(#[source] SupervisorError),
    #[error("failed to create the next layer of the sandbox's disk")]
    Disk(#[from] DiskError),
    #[error("failed to store the snapshot; the sandbox is unchanged")]
    Store(#[from] SnapshotError),
    #[error("failed to update the sandbox's directory; the sandbox is unchanged")]
    SandboxDir(#[from] SandboxDirError),
    #[error("failed to change the sandbox's network access; the sandbox is unchanged")]
    Access(#[source] NetworkError),
    /// There is no disk space for a snapshot.
    #[error("the snapshot was not taken")]
    Space(#[source] AdmissionError),
    #[error("failed to resume the sandbox; it stays paused")]
    Restore(#[source] CreateError),
    /// This host cannot load the memory of the last snapshot.
    #[error(
        "the memory of the paused sandbox cannot be restored; resume with `memory` false to boot from its disk"
    )]
    Unloadable(#[source] Incompatible),
    /// Error that another caller of the same operation received.
    #[error("{0}")]
    Again(String),
    /// The sandbox no longer exists, or the agent is about to exit.
    #[error("the sandbox no longer exists, or the host agent is shutting down")]
    Gone,
}

impl LifecycleError {
    /// Returns the error of a resume that failed because of `error`.
    pub(super) fn from_resume(error: CreateError) -> Self {
        match error {
            CreateError::Snapshot(SnapshotError::Incompatible(reason)) => Self::Unloadable(reason),
            other => Self::Restore(other),
        }
    }

    /// True if the host's disk is full.
    pub(crate) fn is_out_of_space(&self) -> bool {
        match self {
            Self::Store(error) => error.is_out_of_space(),
            Self::SandboxDir(error) => error.is_out_of_space(),
            Self::Disk(error) => error.is_out_of_space(),
            Self::Restore(error) => error.is_out_of_space(),
            Self::Snapshot(error) => error.is_out_of_space(),
            _ => false,
        }
    }
}

/// Reason why a sandbox is not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum UseError {
    #[error("there is no sandbox `{0}`")]
    NotFound(String),
    #[error("sandbox {0} is {1}, not running")]
    NotRunning(SandboxId, &'static str),
    #[error("sandbox {0} is lost: {1}")]
    Lost(SandboxId, String),
}

#[cfg(test)]
mod tests {
    use std::io;

    use thiserror_ext::AsReport as _;

    use super::*;

    #[test]
    fn each_cause_is_reported_once() {
        let error = CreateError::SandboxDir(SandboxDirError::Io {
            step: "write",
            path: "/x".into(),
            source: io::Error::other("deep down"),
        });
        assert_eq!(
            error.to_report_string(),
            "failed to prepare the sandbox's directory: failed to write /x: deep down"
        );
    }
}
