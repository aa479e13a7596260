//! Page server: answers the page faults of a restored machine from a snapshot, and finds what the machine changed.
//!
//! The life of a restore: the VMM maps its guest memory, registers it with userfaultfd and sends the descriptor in
//! [`handshake`]; a [`PageServer`] answers each missing page from a [`MemorySource`]; before a snapshot, [`dirty`] finds
//! the pages that the machine changed. It knows neither VMMs nor snapshot files, and starts no process.
//!
//! Whoever owns a [`PageServer`] owns the machine too, and must kill the machine before the server is stopped, and at
//! once when [`PageServer::failed`] fires: memory without a page server is memory without content.
#![forbid(unsafe_code)]

pub mod dirty;
pub mod handshake;
mod page_set;
pub mod region;
pub mod run;
pub mod server;
pub mod source;

pub use handshake::{Handshake, HandshakeError};
pub use region::{Region, RegionError, Regions};
pub use run::PageRun;
pub use server::{Backing, Failed, Options, PageServer, StartError, Stats};
pub use source::{Extent, MemorySource, SourceError, Zeros};

/// Size of a page of guest memory, bytes.
pub const PAGE_BYTES: u64 = 4096;
