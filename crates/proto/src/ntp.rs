//! Port and packet format of NTP, as far as guest and host need them.

/// UDP port of the time service at the guest's gateway.
pub const PORT: u16 = 123;

/// Size of an NTP packet without extensions, in bytes (RFC 5905, section 7.3).
pub const PACKET_BYTES: usize = 48;

/// Seconds from 1900, the epoch of NTP, to 1970.
pub const UNIX_OFFSET_SEC: u64 = 2_208_988_800;
