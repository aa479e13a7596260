//! Errors of lifecycle operations on a sandbox, and their RPC codes.

use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};
use thiserror_ext::AsReport as _;
use wrenn_model::SandboxId;

use super::Stall;
use crate::{
    cgroup::CgroupError,
    disk::DiskError,
    host::AdmissionError,
    network::{NetworkError, access::AccessError, slot::SlotError},
    sandbox_dir::SandboxDirError,
    snapshots::SnapshotError,
    supervisor::SupervisorError,
    templates::TemplateError,
};

/// Failure to create a sandbox.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum CreateError {
    /// A field of the request is invalid.
    #[error("`{field}`: {reason}")]
    Field { field: &'static str, reason: String },
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The properties of the host cannot be read.
    #[error("failed to read the capacity of this host")]
    Host(#[source] std::io::Error),
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
    fn is_out_of_space(&self) -> bool {
        match self {
            Self::SandboxDir(error) => error.is_out_of_space(),
            Self::Disk(error) => error.is_out_of_space(),
            Self::Slot(SlotError::Io { source, .. }) => crate::host::is_out_of_space(source),
            _ => false,
        }
    }

    fn code(&self) -> ErrorCode {
        if self.is_out_of_space() {
            return ErrorCode::ResourceExhausted;
        }
        match self {
            Self::Field { .. }
            | Self::Access(_)
            | Self::Admission(AdmissionError::OutOfRange { .. }) => ErrorCode::InvalidArgument,
            Self::Admission(_) | Self::Slot(SlotError::Exhausted) => ErrorCode::ResourceExhausted,
            Self::Template(TemplateError::NotFound(_)) => ErrorCode::NotFound,
            Self::Exists(_) | Self::SandboxDir(SandboxDirError::Exists(_)) => {
                ErrorCode::AlreadyExists
            }
            Self::GuestSilent(_) => ErrorCode::DeadlineExceeded,
            Self::Guest(error) => error.code,
            Self::Destroyed => ErrorCode::FailedPrecondition,
            Self::ShuttingDown => ErrorCode::Unavailable,
            _ => ErrorCode::Internal,
        }
    }
}

impl From<&CreateError> for ConnectError {
    fn from(error: &CreateError) -> Self {
        let mut message = error.to_report_string();
        if error.is_out_of_space() {
            message = format!("the host's disk is full: {message}");
        }
        Self::new(error.code(), message)
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

impl From<DestroyError> for ConnectError {
    fn from(error: DestroyError) -> Self {
        let code = match error {
            DestroyError::Gone => ErrorCode::Unavailable,
            _ => ErrorCode::Internal,
        };
        Self::new(code, error.to_report_string())
    }
}

/// Failure to pause, resume or snapshot a sandbox. The sandbox is unchanged, unless its state says
/// otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum FreezeError {
    /// The sandbox's state does not allow the operation.
    #[error("the sandbox is {0}")]
    NotNow(&'static str),
    /// The sandbox has no snapshot.
    #[error("the sandbox has no snapshot to resume from")]
    NeverFrozen,
    #[error("failed to prepare the guest for the snapshot; the sandbox keeps running")]
    Prepare(#[source] ConnectError),
    #[error("failed to snapshot the virtual machine; the sandbox keeps running")]
    Freeze(#[source] SupervisorError),
    #[error("failed to resume the virtual machine after the snapshot; the sandbox is lost")]
    Thaw(#[source] SupervisorError),
    #[error("failed to create the next layer of the sandbox's disk")]
    Disk(#[from] DiskError),
    #[error("failed to store the snapshot; the sandbox is unchanged")]
    Store(#[from] SnapshotError),
    #[error("failed to update the sandbox's directory; the sandbox is unchanged")]
    SandboxDir(#[from] SandboxDirError),
    #[error("failed to change the sandbox's network access; the sandbox is unchanged")]
    Access(#[source] NetworkError),
    #[error("failed to resume the sandbox; it stays paused")]
    Restore(#[source] CreateError),
    /// Error that another caller of the same operation received.
    #[error("{0}")]
    Again(String),
    /// The sandbox no longer exists, or the agent is about to exit.
    #[error("the sandbox no longer exists, or the host agent is shutting down")]
    Gone,
}

impl FreezeError {
    fn is_out_of_space(&self) -> bool {
        match self {
            Self::Store(error) => error.is_out_of_space(),
            Self::SandboxDir(error) => error.is_out_of_space(),
            Self::Disk(error) => error.is_out_of_space(),
            Self::Restore(error) => error.is_out_of_space(),
            Self::Freeze(error) => error.is_out_of_space(),
            _ => false,
        }
    }

    fn code(&self) -> ErrorCode {
        if self.is_out_of_space() {
            return ErrorCode::ResourceExhausted;
        }
        match self {
            Self::NotNow(_) | Self::NeverFrozen | Self::Again(_) => ErrorCode::FailedPrecondition,
            Self::Prepare(error) => error.code,
            Self::Restore(error) => error.code(),
            Self::Gone => ErrorCode::Unavailable,
            _ => ErrorCode::Internal,
        }
    }
}

impl From<FreezeError> for ConnectError {
    fn from(error: FreezeError) -> Self {
        let mut message = error.to_report_string();
        if error.is_out_of_space() {
            message = format!("the host's disk is full: {message}");
        }
        Self::new(error.code(), message)
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

impl From<UseError> for ConnectError {
    fn from(error: UseError) -> Self {
        let code = match error {
            UseError::NotFound(_) => ErrorCode::NotFound,
            UseError::NotRunning(..) | UseError::Lost(..) => ErrorCode::FailedPrecondition,
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    fn full() -> io::Error {
        io::Error::from_raw_os_error(nix::libc::ENOSPC)
    }

    fn folder_error(source: io::Error) -> CreateError {
        CreateError::SandboxDir(SandboxDirError::Io {
            step: "write",
            path: "/x".into(),
            source,
        })
    }

    #[test]
    fn a_full_disk_is_told_as_such_wherever_it_is_met() {
        let disk = DiskError::Failed("qemu-img", "No space left on device".to_owned());
        let slot = SlotError::Io {
            step: "take a slot",
            source: full(),
        };
        for error in [folder_error(full()), disk.into(), slot.into()] {
            let error = ConnectError::from(&error);
            assert_eq!(error.code, ErrorCode::ResourceExhausted);
            assert!(error.to_string().contains("disk is full"), "{error}");
        }
        let other = ConnectError::from(&folder_error(io::ErrorKind::PermissionDenied.into()));
        assert_eq!(other.code, ErrorCode::Internal);
    }

    #[test]
    fn causes_are_told_once_each() {
        let text = folder_error(io::Error::other("deep down")).to_report_string();
        assert_eq!(
            text,
            "failed to prepare the sandbox's directory: failed to write /x: deep down"
        );
    }
}
