//! Sizes and ranges that more than one part must agree on.

/// Virtual CPUs of a sandbox: 1 up to this, and never more than four times the host's.
pub const MAX_VCPUS: u32 = 32;

/// Memory of a sandbox, MiB: at least this (below it the guest does not boot reliably).
pub const MIN_MEMORY_MIB: u32 = 128;

/// Memory of a sandbox, MiB: at most this, and never more than the host has.
pub const MAX_MEMORY_MIB: u32 = 1024 * 1024;

/// Disk of a sandbox, MiB, as the guest sees it; blocks take space on the host when they are written.
pub const DEFAULT_DISK_MIB: u32 = 5120;

/// Disk of a sandbox, MiB: at most this.
pub const MAX_DISK_MIB: u32 = 1024 * 1024;

/// Copies that one fork makes, at most.
pub const MAX_FORK_COPIES: u32 = 100;

/// Names and values of a sandbox's own environment, all together, bytes: far below what an exec takes.
pub const MAX_SANDBOX_ENVS_BYTES: usize = 64 * 1024;

/// Idle time after which a sandbox is paused or destroyed, seconds, when the request does not say.
pub const DEFAULT_TIMEOUT_SEC: u32 = 300;

/// The longest idle time that can be asked for, seconds: 30 days. 0 means never.
pub const MAX_TIMEOUT_SEC: u32 = 30 * 24 * 3600;

/// What `/files/write` and the unary file calls take at most, bytes.
pub const MAX_FILE_MESSAGE_BYTES: usize = 100 * 1024 * 1024;

/// Header of a start that asks the guest agent to tell only that: what the process prints is kept for who connects first.
pub const DETACHED_HEADER: &str = "wrenn-detached";

/// Header by which the host asks the guest agent to put an uploaded file into its place only when it is whole.
pub const WHOLE_UPLOAD_HEADER: &str = "wrenn-upload-whole";

/// Size of one piece of a streamed file, bytes.
pub const FILE_CHUNK_BYTES: usize = 64 * 1024;

/// What a collected `exec` returns at most of each stream, bytes.
pub const MAX_EXEC_OUTPUT_BYTES: usize = 16 * 1024 * 1024;

/// Version of E2B's guest agent whose contract ours keeps; clients switch their features by it.
pub const ENVD_CONTRACT_VERSION: &str = "0.6.13";

/// Address of the metadata service, as a guest sees it.
pub const METADATA_IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 169, 254);

/// TCP port of the guest agent.
pub const ENVD_PORT: u16 = 49983;

/// Address of every guest on its own link, /30.
pub const GUEST_IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 0, 21);

/// The gateway of every guest, /30.
pub const GATEWAY_IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 0, 22);

/// MAC address of every guest.
pub const GUEST_MAC: &str = "02:FC:00:00:00:05";

/// MAC address of every guest's gateway: constant, so that a restored guest's ARP entry stays right.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0xFC, 0x00, 0x00, 0x00, 0x06];

/// Name of the TAP device in every sandbox's network namespace.
pub const TAP_NAME: &str = "tap0";

/// What a guest is called before it is told another name.
pub const GUEST_HOSTNAME: &str = "sandbox";

/// File of a guest that exists once everything that runs after a boot by itself has run.
pub const SETTLED: &str = "/run/wrenn/settled";

/// Size of a packet of the network time protocol without extensions, bytes (RFC 5905, 7.3).
pub const NTP_PACKET_BYTES: usize = 48;

/// Seconds from 1900, the epoch of the network time protocol, to 1970.
pub const NTP_UNIX_OFFSET_SEC: u64 = 2_208_988_800;
