//! Limits, sizes and addresses that several parts of Wrenn must agree on.

/// Maximum number of virtual CPUs per sandbox. The minimum is 1. A sandbox never gets more than
/// four times the CPUs of the host.
pub const MAX_VCPUS: u32 = 32;

/// Minimum memory per sandbox, in MiB. With less memory, the guest does not boot reliably.
pub const MIN_MEMORY_MIB: u32 = 128;

/// Maximum memory per sandbox, in MiB. A sandbox never gets more memory than the host has.
pub const MAX_MEMORY_MIB: u32 = 1024 * 1024;

/// Default disk size of a sandbox as seen by the guest, in MiB. Blocks use space on the host only
/// after they are written.
pub const DEFAULT_DISK_MIB: u32 = 5120;

/// Maximum disk size of a sandbox, in MiB.
pub const MAX_DISK_MIB: u32 = 1024 * 1024;

/// Maximum number of copies per fork.
pub const MAX_FORK_COPIES: u32 = 100;

/// Maximum size of a sandbox's environment, names and values together, in bytes. Far below the
/// limit of exec.
pub const MAX_SANDBOX_ENVS_BYTES: usize = 64 * 1024;

/// Default idle time after which a sandbox is paused or destroyed, in seconds.
pub const DEFAULT_TIMEOUT_SEC: u32 = 300;

/// Maximum idle time in a request, in seconds: 30 days. An idle time of 0 means never.
pub const MAX_TIMEOUT_SEC: u32 = 30 * 24 * 3600;

/// Maximum size of a file in `/files/write` and `/files/read`, in bytes.
pub const MAX_FILE_MESSAGE_BYTES: usize = 100 * 1024 * 1024;

/// Request header of `Start` that makes the guest agent return only the start event. The agent
/// keeps the output of the process for the first client that connects.
pub const DETACHED_HEADER: &str = "wrenn-detached";

/// Request header of an upload that makes the guest agent replace the target file only after the
/// upload is complete.
pub const WHOLE_UPLOAD_HEADER: &str = "wrenn-upload-whole";

/// Size of one chunk of a streamed file, in bytes.
pub const FILE_CHUNK_BYTES: usize = 64 * 1024;

/// Maximum output that a collected `exec` returns, in bytes per stream.
pub const MAX_EXEC_OUTPUT_BYTES: usize = 16 * 1024 * 1024;

/// Version of E2B's guest agent whose contract envd implements. Clients select features by this
/// version.
pub const ENVD_CONTRACT_VERSION: &str = "0.6.13";

/// Address of the metadata service in the guest's network.
pub const METADATA_IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 169, 254);

/// TCP port of the guest agent.
pub const ENVD_PORT: u16 = 49983;

/// Address of every guest on its own link, /30.
pub const GUEST_IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 0, 21);

/// Gateway address of every guest, /30.
pub const GATEWAY_IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 0, 22);

/// MAC address of every guest.
pub const GUEST_MAC: &str = "02:FC:00:00:00:05";

/// MAC address of every guest's gateway. Constant, so that the ARP entry of a restored guest stays
/// valid.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0xFC, 0x00, 0x00, 0x00, 0x06];

/// Name of the TAP device in every sandbox's network namespace.
pub const TAP_NAME: &str = "tap0";

/// Initial hostname of a guest, until the host assigns another one.
pub const GUEST_HOSTNAME: &str = "sandbox";

/// File in the guest that exists once all automatic work after a boot is complete.
pub const SETTLED: &str = "/run/wrenn/settled";

/// Size of an NTP packet without extensions, in bytes (RFC 5905, section 7.3).
pub const NTP_PACKET_BYTES: usize = 48;

/// Seconds from 1900, the epoch of NTP, to 1970.
pub const NTP_UNIX_OFFSET_SEC: u64 = 2_208_988_800;

/// Header of calls to the host agent that names the caller's installation: the id in the control
/// plane's database.
pub const INSTALLATION_HEADER: &str = "wrenn-installation";
