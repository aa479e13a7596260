//! Nameservers of guests.
//!
//! A nameserver of the host that guests can reach over the network is used directly. Any other, for
//! example the stub of systemd-resolved on loopback, a server on an address of the host, or a server
//! with an IPv6 address, is used through a forwarder at the guest's gateway, which the supervisor
//! runs.

use std::net::{IpAddr, Ipv4Addr};

use wrenn_proto::guest::GATEWAY_IP;

use super::{ceiling::Ceiling, egress::Access, surroundings::Surroundings};

/// Nameservers of the host, as its sandboxes use them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Nameservers {
    /// In the order of the host.
    servers: Vec<Nameserver>,
}

/// Nameserver of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nameserver {
    /// Guests send their requests to it.
    Direct(Ipv4Addr),
    /// The forwarder sends the requests of guests to it.
    Forwarded(IpAddr),
}

/// Nameservers of one sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct GuestNameservers {
    /// Addresses for the guest's `resolv.conf`.
    pub(crate) guest: Vec<Ipv4Addr>,
    /// Nameservers that the forwarder uses. Empty if there is no forwarder.
    pub(crate) upstreams: Vec<IpAddr>,
}

impl Nameservers {
    /// Decides how guests use each of the host's nameservers.
    pub(super) fn of_host(servers: &[IpAddr], host: &Surroundings) -> Self {
        let usage = |server: &IpAddr| match server {
            IpAddr::V4(address) if !host.is_own_address(*address) => Nameserver::Direct(*address),
            _ => Nameserver::Forwarded(*server),
        };
        Self {
            servers: servers.iter().map(usage).collect(),
        }
    }

    /// Returns the nameservers that all sandboxes may use directly.
    pub(super) fn direct(&self, ceiling: &Ceiling) -> Vec<Ipv4Addr> {
        let direct = |server: &Nameserver| match server {
            Nameserver::Direct(address) if ceiling.permits_nameserver(*address) => Some(*address),
            _ => None,
        };
        let mut found: Vec<_> = self.servers.iter().filter_map(direct).collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Returns the nameservers of a sandbox. A sandbox uses a nameserver directly if its lists
    /// permit the address, and the forwarder if it has egress by default: the names that a sandbox
    /// with a list of addresses needs are then up to its client.
    pub(super) fn for_guest(&self, access: &Access, ceiling: &Ceiling) -> GuestNameservers {
        let mut found = GuestNameservers::default();
        if access.permitted(ceiling).is_empty() {
            return found;
        }
        for server in &self.servers {
            let address = match server {
                Nameserver::Direct(address)
                    if access.asks_for(*address) && ceiling.permits_nameserver(*address) =>
                {
                    *address
                }
                Nameserver::Forwarded(upstream) if access.egress => {
                    found.upstreams.push(*upstream);
                    GATEWAY_IP
                }
                _ => continue,
            };
            if !found.guest.contains(&address) {
                found.guest.push(address);
            }
        }
        found
    }
}

impl std::fmt::Display for Nameservers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.servers.is_empty() {
            return f.write_str("none");
        }
        for (index, server) in self.servers.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            match server {
                Nameserver::Direct(address) => write!(f, "{separator}{address}")?,
                Nameserver::Forwarded(address) => write!(f, "{separator}{address} (forwarded)")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::network::{addresses::Subnets, ceiling::EgressCeiling};

    fn host(servers: &[&str]) -> Nameservers {
        let servers: Vec<IpAddr> = servers.iter().map(|text| text.parse().unwrap()).collect();
        Nameservers::of_host(&servers, &Surroundings::default())
    }

    fn guest(servers: &[&str], access: &Access, closed: &[&str]) -> (String, usize) {
        let setting = EgressCeiling {
            closed: closed.iter().map(|text| text.parse().unwrap()).collect(),
            ..EgressCeiling::default()
        };
        let ceiling = Ceiling::new(setting, Subnets::DEFAULT);
        let found = host(servers).for_guest(access, &ceiling);
        let guest: Vec<_> = found.guest.iter().map(ToString::to_string).collect();
        (guest.join(" "), found.upstreams.len())
    }

    fn found(guest: &str, upstreams: usize) -> (String, usize) {
        (guest.to_owned(), upstreams)
    }

    #[test]
    fn a_nameserver_on_the_network_is_used_directly_and_others_through_the_gateway() {
        let open = Access::parse(true, &[], &[]).unwrap();
        let stub = ["127.0.0.53", "192.168.1.1", "127.0.0.54", "2001:db8::1"];
        assert_eq!(
            guest(&stub, &open, &[]),
            found("169.254.0.22 192.168.1.1", 3)
        );
        assert_eq!(guest(&["192.168.1.1"], &open, &[]), found("192.168.1.1", 0));
        assert_eq!(guest(&[], &open, &[]), found("", 0));
        assert_eq!(
            host(&stub[..2]).to_string(),
            "127.0.0.53 (forwarded), 192.168.1.1"
        );
    }

    #[test]
    fn lists_and_ceiling_hold_for_nameservers_too() {
        let servers = ["127.0.0.53", "192.168.1.1"];
        let closed = Access::parse(false, &[], &[]).unwrap();
        assert_eq!(guest(&servers, &closed, &[]), found("", 0));
        let listed = Access::parse(false, &["192.168.1.1".into(), "8.8.8.8".into()], &[]).unwrap();
        assert_eq!(guest(&servers, &listed, &[]), found("192.168.1.1", 0));
        let denied = Access::parse(true, &[], &["192.168.0.0/16".into()]).unwrap();
        assert_eq!(guest(&servers, &denied, &[]), found("169.254.0.22", 1));
        let open = Access::parse(true, &[], &[]).unwrap();
        let by_operator = guest(&servers, &open, &["192.168.1.1/32"]);
        assert_eq!(by_operator, found("169.254.0.22", 1));
    }
}
