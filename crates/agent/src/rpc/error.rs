//! RPC codes and messages of the errors of this agent.

use connectrpc::{ConnectError, ErrorCode};
use thiserror_ext::AsReport as _;

use crate::{
    admission::AdmissionError,
    inventory::InventoryError,
    network::slot::SlotError,
    sandbox::{
        CreateError, DestroyError, LifecycleError, UseError,
        service::{DeleteSnapshotError, ForkError, NamedSnapshotError, RemoteSnapshotError},
    },
    sandbox_dir::SandboxDirError,
    snapshots::{RemoteError, SnapshotError},
    templates::TemplateError,
};

const fn admission_code(error: &AdmissionError) -> ErrorCode {
    match error {
        AdmissionError::Field { .. }
        | AdmissionError::OutOfRange { .. }
        | AdmissionError::Egress(_)
        | AdmissionError::DiskSize { .. }
        | AdmissionError::Copies { .. } => ErrorCode::InvalidArgument,
        AdmissionError::Memory { .. }
        | AdmissionError::Promised { .. }
        | AdmissionError::Disk { .. }
        | AdmissionError::DiskBudget { .. }
        | AdmissionError::SandboxBudget { .. } => ErrorCode::ResourceExhausted,
        AdmissionError::Template(TemplateError::NotFound(_)) => ErrorCode::NotFound,
        // Another host may be able to restore the snapshot.
        AdmissionError::Snapshot(SnapshotError::Incompatible(_)) => ErrorCode::FailedPrecondition,
        AdmissionError::Template(_) | AdmissionError::Snapshot(_) | AdmissionError::Capacity(_) => {
            ErrorCode::Internal
        }
    }
}

fn create_code(error: &CreateError) -> ErrorCode {
    if error.is_out_of_space() {
        return ErrorCode::ResourceExhausted;
    }
    match error {
        CreateError::Admission(error) => admission_code(error),
        CreateError::Slot(SlotError::Exhausted) => ErrorCode::ResourceExhausted,
        CreateError::Exists(_) | CreateError::SandboxDir(SandboxDirError::Exists(_)) => {
            ErrorCode::AlreadyExists
        }
        CreateError::GuestSilent(_) => ErrorCode::DeadlineExceeded,
        CreateError::Guest(error) => error.code,
        CreateError::Destroyed => ErrorCode::Aborted,
        CreateError::ShuttingDown => ErrorCode::Unavailable,
        _ => ErrorCode::Internal,
    }
}

fn snapshot_code(error: &LifecycleError) -> ErrorCode {
    if error.is_out_of_space() {
        return ErrorCode::ResourceExhausted;
    }
    match error {
        LifecycleError::NotNow(_)
        | LifecycleError::NoSnapshot
        | LifecycleError::Unloadable(_)
        | LifecycleError::Again(_) => ErrorCode::FailedPrecondition,
        // Not the code of the guest, which could claim a full disk to prolong its lifetime.
        LifecycleError::Prepare(_) => ErrorCode::FailedPrecondition,
        LifecycleError::GuestSilent => ErrorCode::DeadlineExceeded,
        LifecycleError::Destroyed => ErrorCode::Aborted,
        LifecycleError::Restore(error) => create_code(error),
        LifecycleError::Space(error) => admission_code(error),
        LifecycleError::Gone => ErrorCode::Unavailable,
        _ => ErrorCode::Internal,
    }
}

/// Returns the message for an error that may be due to a full disk.
fn message(error: &impl std::error::Error, is_out_of_space: bool) -> String {
    let message = error.to_report_string();
    if is_out_of_space {
        return format!("the host's disk is full: {message}");
    }
    message
}

impl From<AdmissionError> for ConnectError {
    fn from(error: AdmissionError) -> Self {
        Self::new(admission_code(&error), error.to_report_string())
    }
}

impl From<CreateError> for ConnectError {
    fn from(error: CreateError) -> Self {
        let message = message(&error, error.is_out_of_space());
        Self::new(create_code(&error), message)
    }
}

impl From<LifecycleError> for ConnectError {
    fn from(error: LifecycleError) -> Self {
        let message = message(&error, error.is_out_of_space());
        Self::new(snapshot_code(&error), message)
    }
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

impl From<UseError> for ConnectError {
    fn from(error: UseError) -> Self {
        let code = match error {
            UseError::NotFound(_) => ErrorCode::NotFound,
            UseError::NotRunning(..) | UseError::Lost(..) => ErrorCode::FailedPrecondition,
        };
        Self::new(code, error.to_string())
    }
}

impl From<InventoryError> for ConnectError {
    fn from(error: InventoryError) -> Self {
        Self::internal(error.to_report_string())
    }
}

impl From<NamedSnapshotError> for ConnectError {
    fn from(error: NamedSnapshotError) -> Self {
        match error {
            NamedSnapshotError::Taken(_) => Self::already_exists(error.to_string()),
            NamedSnapshotError::Sandbox(error) => error.into(),
            NamedSnapshotError::Template(_)
            | NamedSnapshotError::Store(_)
            | NamedSnapshotError::Panicked => Self::internal(error.to_report_string()),
        }
    }
}

impl From<DeleteSnapshotError> for ConnectError {
    fn from(error: DeleteSnapshotError) -> Self {
        match error {
            DeleteSnapshotError::Unknown(_) => Self::not_found(error.to_string()),
            DeleteSnapshotError::InUse { .. } => Self::failed_precondition(error.to_string()),
            DeleteSnapshotError::Store(_) | DeleteSnapshotError::Panicked => {
                Self::internal(error.to_report_string())
            }
        }
    }
}

impl From<RemoteSnapshotError> for ConnectError {
    fn from(error: RemoteSnapshotError) -> Self {
        let code = match &error {
            RemoteSnapshotError::Taken(_) => ErrorCode::AlreadyExists,
            RemoteSnapshotError::Remote(error) => remote_code(error),
            RemoteSnapshotError::Space(error) => admission_code(error),
            RemoteSnapshotError::Template(_) | RemoteSnapshotError::Panicked => ErrorCode::Internal,
        };
        Self::new(code, error.to_report_string())
    }
}

fn remote_code(error: &RemoteError) -> ErrorCode {
    match error {
        RemoteError::NotConfigured => ErrorCode::FailedPrecondition,
        RemoteError::Unknown(_) | RemoteError::NotHere(_) => ErrorCode::NotFound,
        RemoteError::Store(wrenn_store::StoreError::Remote { .. }) => ErrorCode::Unavailable,
        RemoteError::Snapshot(SnapshotError::Incompatible(_)) => ErrorCode::FailedPrecondition,
        RemoteError::Snapshot(error) if error.is_out_of_space() => ErrorCode::ResourceExhausted,
        _ => ErrorCode::Internal,
    }
}

impl From<ForkError> for ConnectError {
    fn from(error: ForkError) -> Self {
        match error {
            ForkError::Snapshot(error) => error.into(),
            ForkError::Copy(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use wrenn_disk::DiskError;

    use super::*;

    fn full() -> io::Error {
        io::Error::from_raw_os_error(nix::libc::ENOSPC)
    }

    fn dir_error(source: io::Error) -> CreateError {
        CreateError::SandboxDir(SandboxDirError::Io {
            step: "write",
            path: "/x".into(),
            source,
        })
    }

    #[test]
    fn a_full_disk_is_reported_as_such_by_every_error() {
        let disk = DiskError::Failed("qemu-img", "No space left on device".to_owned());
        let slot = SlotError::Io {
            step: "take a slot",
            source: full(),
        };
        for error in [dir_error(full()), disk.into(), slot.into()] {
            let error = ConnectError::from(error);
            assert_eq!(error.code, ErrorCode::ResourceExhausted);
            assert!(error.to_string().contains("disk is full"), "{error}");
        }
        let other = ConnectError::from(dir_error(io::ErrorKind::PermissionDenied.into()));
        assert_eq!(other.code, ErrorCode::Internal);
    }
}
