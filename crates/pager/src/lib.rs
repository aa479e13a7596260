//! Page server: resolves the page faults of a restored VM from a snapshot, and finds the pages that
//! the VM changed.
//!
//! Steps of a restore:
//!
//! 1. The VMM maps its guest memory, registers it with userfaultfd and sends the descriptor in the
//!    [`handshake`].
//! 2. A [`PageServer`] resolves each missing page from a [`MemorySource`].
//! 3. Before the next snapshot, [`dirty`] finds the pages that the VM changed, or [`sparse`] if the
//!    VMM wrote them to a file.
//!
//! This crate has no knowledge of VMMs or snapshot files, and starts no process.
//!
//! The owner of a [`PageServer`] also owns the VM. The owner must kill the VM before it stops the
//! server, and at once when [`PageServer::failed`] fires: memory without a page server is memory
//! without content.
#![forbid(unsafe_code)]

pub mod dirty;
pub mod handshake;
mod page_set;
pub mod region;
pub mod run;
pub mod server;
pub mod source;
pub mod sparse;

pub use handshake::{Handshake, HandshakeError};
pub use region::{Region, RegionError, Regions};
pub use run::PageRun;
pub use server::{Backing, Failed, Options, PageServer, StartError, Stats};
pub use source::{Extent, MemorySource, SourceError, Zeros};

/// Size of a page of guest memory, in bytes.
pub const PAGE_BYTES: u64 = 4096;
