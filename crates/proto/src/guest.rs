//! Addresses, names and paths that a guest and its host agree on. They are the same in every
//! sandbox, so that a restored guest finds them unchanged.

/// Version of E2B's guest agent whose contract envd implements. Clients select features by this
/// version.
pub const ENVD_CONTRACT_VERSION: &str = "0.6.13";

/// Address of the metadata service in the guest's network.
pub const METADATA_IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 169, 254);

/// TCP port of the metadata service.
pub const METADATA_PORT: u16 = 80;

/// UDP and TCP port of the DNS forwarder at the gateway, and of nameservers.
pub const DNS_PORT: u16 = 53;

/// TCP port of the guest agent.
pub const ENVD_PORT: u16 = 49983;

/// Address of every guest on its own link, /30.
pub const IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 0, 21);

/// Gateway address of every guest, /30.
pub const GATEWAY_IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 0, 22);

/// MAC address of every guest.
pub const MAC: &str = "02:FC:00:00:00:05";

/// MAC address of every guest's gateway. Constant, so that the ARP entry of a restored guest stays
/// valid.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0xFC, 0x00, 0x00, 0x00, 0x06];

/// MTU of a guest's link unless its host sets another one: that of Ethernet.
pub const DEFAULT_MTU: u32 = 1500;

/// Name of the TAP device in every sandbox's network namespace.
pub const TAP_NAME: &str = "tap0";

/// Initial hostname of a guest, until the host assigns another one.
pub const HOSTNAME: &str = "sandbox";

/// File in the guest that exists once all automatic work after a boot is complete.
pub const SETTLED: &str = "/run/wrenn/settled";
