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
