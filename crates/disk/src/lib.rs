//! Disks of VMs: qcow2 files with the programs of QEMU that create and merge them.
//!
//! A disk is a chain: a raw base image, read-only layers, and the file that the VM writes to. This
//! crate creates empty files, measures and merges layers, and presents a chain as a raw file
//! ([`Export`]). It knows neither sandboxes nor snapshots.
//!
//! Layers are written by VMMs, which may be compromised. No process outside a jail parses one
//! ([`merge()`], [`visible_bytes`], [`Export`]), except for the header, which is checked first
//! ([`Header`]).
#![forbid(unsafe_code)]

mod error;
pub mod export;
mod header;
mod measure;
mod merge;
mod overlay;
mod tool;

pub use error::DiskError;
pub use export::{Export, ExportConfig, MountedExport};
pub use header::{Header, HeaderError};
pub use measure::visible_bytes;
pub use merge::{Layers, merge};
pub use overlay::create;
pub use tool::ToolJails;
