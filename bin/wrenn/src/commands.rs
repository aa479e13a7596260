//! Commands, one file per command: its arguments and its implementation.

pub(crate) mod completions;
pub(crate) mod cp;
pub(crate) mod doctor;
pub(crate) mod exec;
pub(crate) mod image;
pub(crate) mod key;
pub(crate) mod process;
pub(crate) mod run;
pub(crate) mod sandbox;
pub(crate) mod serve;
pub(crate) mod shell;
pub(crate) mod snapshot;
