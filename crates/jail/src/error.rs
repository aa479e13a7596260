//! Failure of a step into the jail.

use std::io;

/// Failure of one step into the jail.
#[derive(Debug, thiserror::Error)]
#[error("jail: failed to {step}: {source}")]
pub struct JailError {
    step: String,
    source: io::Error,
}

pub(crate) fn failed(step: impl Into<String>) -> impl FnOnce(io::Error) -> JailError {
    let step = step.into();
    move |source| JailError { step, source }
}

pub(crate) fn failed_nix(step: impl Into<String>) -> impl FnOnce(nix::Error) -> JailError {
    let step = step.into();
    move |source| JailError {
        step,
        source: source.into(),
    }
}
