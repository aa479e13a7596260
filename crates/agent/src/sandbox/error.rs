//! Why something could not be done with a sandbox, and the RPC code of that.

use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};
use wrenn_proto::SandboxId;

use crate::{
    cgroup::CgroupError,
    disk::DiskError,
    folder::FolderError,
    host::AdmissionError,
    network::{NetworkError, access::AccessError, slot::SlotError},
    snapshots::SnapshotError,
    supervisor::SupervisorError,
    templates::TemplateError,
};

/// Why a sandbox was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum CreateError {
    /// A field of the request is wrong.
    #[error("{field}: {reason}")]
    Field { field: &'static str, reason: String },
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The host's own facts cannot be read.
    #[error("could not find out what this host has")]
    Host(#[source] std::io::Error),
    /// There is one of this id.
    #[error("a sandbox {0} exists already")]
    Exists(SandboxId),
    #[error("could not make the sandbox's folder")]
    Folder(#[source] FolderError),
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error("could not make the sandbox's network")]
    Network(#[from] NetworkError),
    #[error("could not limit the sandbox's resources")]
    Cgroup(#[from] CgroupError),
    #[error("could not make the sandbox's disk")]
    Disk(#[from] DiskError),
    #[error("could not start the sandbox's virtual machine")]
    Supervisor(#[source] SupervisorError),
    /// The machine was there and ended.
    #[error("the sandbox's virtual machine ended while it booted: {0}")]
    Ended(String),
    /// The guest agent never answered.
    #[error("the sandbox's guest did not answer within {0:?}")]
    GuestSilent(Duration),
    /// The guest agent refused its settings.
    #[error("the sandbox's guest agent could not be set up")]
    Guest(#[source] ConnectError),
    /// Somebody destroyed it.
    #[error("the sandbox was destroyed while it started")]
    Destroyed,
    /// The agent ends.
    #[error("the host agent is shutting down")]
    ShuttingDown,
    /// A task of the agent panicked.
    #[error("the host agent failed inside; see its log")]
    Panicked,
}

impl CreateError {
    fn is_out_of_space(&self) -> bool {
        match self {
            Self::Folder(error) => error.is_out_of_space(),
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
            Self::Exists(_) | Self::Folder(FolderError::Exists(_)) => ErrorCode::AlreadyExists,
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
        let mut message = chain(error);
        if error.is_out_of_space() {
            message = format!("the host's disk is full: {message}");
        }
        Self::new(error.code(), message)
    }
}

/// Why a sandbox could not be freed. What could not be freed is still known: destroying again tries again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum DestroyError {
    #[error("could not end the sandbox's virtual machine")]
    Supervisor(#[from] SupervisorError),
    #[error("could not end the sandbox's processes")]
    Cgroup(#[from] CgroupError),
    #[error("could not remove the sandbox's network")]
    Network(#[from] NetworkError),
    #[error("could not remove the sandbox's disk")]
    Disk(#[from] DiskError),
    #[error("could not give the sandbox's network slot back")]
    Slot(#[from] SlotError),
    #[error("could not remove the sandbox's folder")]
    Folder(#[from] FolderError),
    /// Another destroy of it, at the same time, failed.
    #[error("{0}")]
    Again(String),
    /// It is gone, or the agent is about to be.
    #[error("the sandbox is gone, or the host agent is shutting down")]
    Gone,
}

impl From<DestroyError> for ConnectError {
    fn from(error: DestroyError) -> Self {
        let code = match error {
            DestroyError::Gone => ErrorCode::Unavailable,
            _ => ErrorCode::Internal,
        };
        Self::new(code, chain(&error))
    }
}

/// Why a sandbox was not paused, resumed or frozen. It is as it was, unless its state says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum FreezeError {
    /// Its state does not allow it.
    #[error("the sandbox is {0}")]
    NotNow(&'static str),
    /// It was never frozen.
    #[error("the sandbox was never paused or frozen: there is nothing to bring it back from")]
    NeverFrozen,
    #[error("the guest could not get ready to be frozen; it runs on")]
    Prepare(#[source] ConnectError),
    #[error("the machine could not be frozen; it runs on")]
    Freeze(#[source] SupervisorError),
    #[error("the machine was frozen and could not be let go on; it is lost")]
    Thaw(#[source] SupervisorError),
    #[error("could not make the next layer of the sandbox's disk")]
    Disk(#[from] DiskError),
    #[error("the snapshot could not be stored; the sandbox is as it was")]
    Store(#[from] SnapshotError),
    #[error("could not note in the sandbox's folder that it is frozen; it runs on")]
    Folder(#[from] FolderError),
    #[error("what the sandbox may reach could not be changed; it is as it was")]
    Access(#[source] NetworkError),
    #[error("the sandbox could not be brought back; it is paused still")]
    Restore(#[source] CreateError),
    /// What another one who asked was told.
    #[error("{0}")]
    Again(String),
    /// It is gone, or the agent is about to be.
    #[error("the sandbox is gone, or the host agent is shutting down")]
    Gone,
}

impl FreezeError {
    fn is_out_of_space(&self) -> bool {
        match self {
            Self::Store(error) => error.is_out_of_space(),
            Self::Folder(error) => error.is_out_of_space(),
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
        let mut message = chain(&error);
        if error.is_out_of_space() {
            message = format!("the host's disk is full: {message}");
        }
        Self::new(error.code(), message)
    }
}

/// Why a sandbox cannot be used.
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

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    fn full() -> io::Error {
        io::Error::from_raw_os_error(nix::libc::ENOSPC)
    }

    fn folder_error(source: io::Error) -> CreateError {
        CreateError::Folder(FolderError::Io {
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
        let text = chain(&folder_error(io::Error::other("deep down")));
        assert_eq!(
            text,
            "could not make the sandbox's folder: could not write /x: deep down"
        );
    }
}
