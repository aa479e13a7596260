//! Names of the files of a snapshot.

/// Memory header ([`Header`](crate::Header)).
pub const HEADER: &str = "header";
/// State of CPU and devices; the VMM's own format.
pub const DEVICE: &str = "device";
/// What the snapshot is of ([`Manifest`](crate::Manifest)).
pub const MANIFEST: &str = "manifest.json";
/// Pages to load ahead ([`WorkingSet`](crate::WorkingSet)); may be missing.
pub const WORKING_SET: &str = "working-set";
/// The memory diff of a snapshot in the making; once published it is `memory/<build>.mem` in the store.
pub const MEMORY: &str = "memory";
