//! File names of a snapshot.

/// Memory header ([`Header`](crate::Header)).
pub const HEADER: &str = "header";
/// CPU and device state, in the VMM's own format.
pub const DEVICE: &str = "device";
/// Description of the snapshot ([`Manifest`](crate::Manifest)).
pub const MANIFEST: &str = "manifest.json";
/// Pages to prefetch ([`WorkingSet`](crate::WorkingSet)); optional.
pub const WORKING_SET: &str = "working-set";
/// Memory diff of a staged snapshot. After publishing, the file is `memory/<build>.mem` in the
/// store.
pub const MEMORY: &str = "memory";
