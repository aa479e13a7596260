//! Why a supervisor could not do its work.

use std::{io, path::PathBuf};

/// Why a supervisor ended other than by request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SupervisorError {
    /// `spec.json` cannot be read.
    #[error("could not read {path}")]
    ReadSpec {
        /// The file.
        path: PathBuf,
        /// Its failure.
        #[source]
        source: io::Error,
    },
    /// `spec.json` is not what it should be.
    #[error("{path} is not a sandbox's specification")]
    ParseSpec {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A step on the way failed.
    #[error("could not {step}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// Its failure.
        #[source]
        source: io::Error,
    },
    /// The library that goes into the VMM is missing.
    #[error(
        "the library for the VMM is neither {beside} nor {installed}: install or build wrenn again"
    )]
    NoPreload {
        /// Where it was looked for first.
        beside: PathBuf,
        /// Where it was looked for next.
        installed: PathBuf,
    },
    /// A file could not be written.
    #[error("could not write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Its failure.
        #[source]
        source: io::Error,
    },
    /// The header of the snapshot is damaged.
    #[error("{path} is damaged")]
    Header {
        /// The file.
        path: PathBuf,
        /// Where and how.
        #[source]
        source: wrenn_snapshot::HeaderError,
    },
    /// A file of the snapshot cannot be used; the text names it.
    #[error(transparent)]
    Chain(#[from] wrenn_snapshot::ChainError),
    /// What the machine changed could not be written.
    #[error(transparent)]
    Diff(#[from] wrenn_snapshot::DiffError),
    /// What the machine changed could not be found.
    #[error(transparent)]
    Dirty(#[from] wrenn_pager::dirty::DirtyError),
    /// The snapshot is of a machine of another size.
    #[error("the snapshot has {snapshot} bytes of memory, the sandbox {wanted}")]
    MemorySize {
        /// Of the snapshot, bytes.
        snapshot: u64,
        /// Of the sandbox, bytes.
        wanted: u64,
    },
    /// Not a build id.
    #[error("`{0}` is not a build id")]
    Build(String),
    /// The VMM has mapped memory in a way that is not understood.
    #[error("the VMM has not mapped the guest's memory as one piece")]
    Layout,
    /// The VMM did not tell where memory is.
    #[error("the VMM did not hand over the guest's memory")]
    Handshake(#[from] wrenn_pager::HandshakeError),
    /// The page server did not start.
    #[error("the guest's memory cannot be served")]
    PageServer(#[from] wrenn_pager::StartError),
    /// The page server cannot go on, so the machine was ended.
    #[error("the guest's memory could not be served any more: {0}")]
    Pages(String),
    /// The frozen state of CPU and devices cannot be used.
    #[error("{path} cannot be loaded: it is damaged, or of another machine")]
    DeviceState {
        /// The file.
        path: PathBuf,
        /// In the VMM's words.
        #[source]
        source: wrenn_vmm::ControlError,
    },
    /// A machine that was frozen did not do as it was told.
    #[error(transparent)]
    Control(#[from] wrenn_vmm::ControlError),
    /// A task of this process failed inside.
    #[error("the supervisor failed inside; see its log")]
    Panicked,
    /// The machine did not start.
    #[error("the virtual machine did not start")]
    Launch(#[from] wrenn_vmm::LaunchError),
    /// The machine would not stop.
    #[error("the virtual machine could not be stopped")]
    Stop(#[from] wrenn_vmm::StopError),
    /// The machine ended by itself.
    #[error("{0}")]
    Ended(wrenn_vmm::MachineExit),
}

impl SupervisorError {
    /// For `map_err`: the step that failed.
    pub(crate) fn io(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { step, source }
    }

    /// The error and its causes in one line.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}
