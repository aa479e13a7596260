//! Routes and links of the host, read from the kernel, and what follows from them for the sandboxes'
//! networks.
//!
//! Links to sandboxes are left out: what belongs to a sandbox is not part of its surroundings.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;
use wrenn_proto::guest::DEFAULT_MTU;

use super::{
    addresses::{Subnets, VETH_PREFIX},
    ranges::{Range, intersection, ranges_of},
};

/// Smallest MTU that every IPv4 host must be able to use.
const MIN_MTU: u32 = 576;

/// Shortest prefix of a route to a particular network. VPNs replace the default route by two routes
/// of length 1.
const MIN_NETWORK_PREFIX: u8 = 8;

/// `RT_TABLE_MAIN` of `linux/rtnetlink.h`.
const MAIN_TABLE: u32 = 254;

/// Kind of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RouteKind {
    /// To a network, through a link.
    Unicast,
    /// Address of the host itself.
    Local,
    /// Any other that leads nowhere, for example `unreachable`.
    Nowhere,
}

/// Route of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) destination: Ipv4Net,
    pub(super) kind: RouteKind,
    /// Names of the links, several for a multipath route.
    pub(super) links: Vec<String>,
    /// True if the destination is reached without a gateway.
    pub(super) direct: bool,
    pub(super) table: u32,
    pub(super) metric: u32,
}

/// Routes and links of the host, without those of sandboxes and of loopback.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Surroundings {
    pub(super) routes: Vec<Route>,
    /// MTU of each link.
    pub(super) mtus: BTreeMap<String, u32>,
}

/// True if a link is one of a sandbox, or loopback.
pub(super) fn is_internal(link: &str) -> bool {
    link == "lo" || link.starts_with(VETH_PREFIX)
}

impl Surroundings {
    /// Returns the networks that the host is directly connected to.
    pub(super) fn neighbours(&self) -> Vec<Ipv4Net> {
        let networks = self.routes.iter().filter(|route| {
            route.kind == RouteKind::Unicast && route.direct && route.is_to_a_network()
        });
        let mut found: Vec<_> = networks.map(|route| route.destination).collect();
        found.sort();
        found.dedup();
        found
    }

    /// Returns the links through which packets to the permitted ranges may leave.
    pub(super) fn uplinks(&self, permitted: &[Range]) -> BTreeSet<String> {
        let leads_there = |route: &&Route| {
            let destination = ranges_of([&route.destination]);
            route.kind == RouteKind::Unicast && !intersection(&destination, permitted).is_empty()
        };
        let routes = self.routes.iter().filter(leads_there);
        routes.flat_map(|route| route.links.clone()).collect()
    }

    /// Returns the MTU of links to sandboxes: that of the link with the default route, at most that
    /// of Ethernet.
    pub(super) fn mtu(&self) -> u32 {
        let link = self.default_link();
        let mtu = link.and_then(|link| self.mtus.get(link));
        mtu.map_or(DEFAULT_MTU, |mtu| (*mtu).clamp(MIN_MTU, DEFAULT_MTU))
    }

    /// Returns the link with the best default route.
    pub(super) fn default_link(&self) -> Option<&str> {
        let is_default = |route: &&Route| {
            route.kind == RouteKind::Unicast
                && route.table == MAIN_TABLE
                && route.destination.prefix_len() == 0
        };
        let best = self
            .routes
            .iter()
            .filter(is_default)
            .min_by_key(|route| route.metric);
        best.and_then(|route| route.links.first())
            .map(String::as_str)
    }

    /// True if the host has this address.
    pub(super) fn is_own_address(&self, address: Ipv4Addr) -> bool {
        let is_it =
            |route: &Route| route.kind == RouteKind::Local && route.destination.contains(&address);
        address.is_loopback() || self.routes.iter().any(is_it)
    }

    /// Returns the reason why sandboxes cannot use `subnets`: a route or an address of the host that
    /// would become unreachable.
    pub(super) fn conflict(&self, subnets: Subnets) -> Option<String> {
        for block in subnets.blocks() {
            let overlaps = |route: &&Route| {
                route.is_to_a_network()
                    && (block.contains(&route.destination) || route.destination.contains(&block))
            };
            if let Some(route) = self.routes.iter().find(overlaps) {
                return Some(format!("{block} overlaps the host's {route}"));
            }
        }
        None
    }
}

impl Route {
    /// False for a default route, or a part of one.
    const fn is_to_a_network(&self) -> bool {
        self.destination.prefix_len() >= MIN_NETWORK_PREFIX
    }
}

impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            RouteKind::Local => "address",
            RouteKind::Unicast | RouteKind::Nowhere => "route",
        };
        write!(f, "{kind} {}", self.destination)?;
        match self.links.first() {
            Some(link) => write!(f, " ({link})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a route of the main table through a gateway.
    fn route(destination: &str, link: &str) -> Route {
        Route {
            destination: destination.parse().expect("a block"),
            kind: RouteKind::Unicast,
            links: vec![link.to_owned()],
            direct: false,
            table: MAIN_TABLE,
            metric: 0,
        }
    }

    fn direct(destination: &str, link: &str) -> Route {
        Route {
            direct: true,
            ..route(destination, link)
        }
    }

    fn host() -> Surroundings {
        let worse = Route {
            metric: 600,
            ..route("0.0.0.0/0", "wlan0")
        };
        let address = Route {
            kind: RouteKind::Local,
            table: 255,
            ..direct("192.168.1.7/32", "eth0")
        };
        Surroundings {
            routes: vec![
                worse,
                route("0.0.0.0/0", "eth0"),
                direct("192.168.1.0/24", "eth0"),
                direct("203.0.114.0/24", "eth1"),
                route("10.0.0.0/8", "tun0"),
                address,
            ],
            mtus: [("eth0", 1400), ("wlan0", 1500), ("tun0", 1280)]
                .map(|(name, mtu)| (name.to_owned(), mtu))
                .into(),
        }
    }

    #[test]
    fn networks_beside_the_host_are_those_without_a_gateway() {
        let expected: [Ipv4Net; 2] =
            ["192.168.1.0/24", "203.0.114.0/24"].map(|text| text.parse().expect("a block"));
        assert_eq!(host().neighbours(), expected);
        // WireGuard and OpenVPN replace the default route like this.
        let vpn = Surroundings {
            routes: vec![direct("0.0.0.0/1", "wg0"), direct("128.0.0.0/1", "wg0")],
            ..Surroundings::default()
        };
        assert!(vpn.neighbours().is_empty());
        assert_eq!(vpn.conflict(Subnets::DEFAULT), None);
    }

    #[test]
    fn the_mtu_is_that_of_the_best_default_route() {
        assert_eq!(host().mtu(), 1400);
        let mut jumbo = host();
        jumbo.mtus.insert("eth0".to_owned(), 9000);
        assert_eq!(jumbo.mtu(), 1500);
        assert_eq!(Surroundings::default().mtu(), 1500);
    }

    #[test]
    fn uplinks_are_the_links_that_lead_to_a_permitted_range() {
        let ranges = |text: &str| ranges_of([&text.parse().expect("a block")]);
        let names = |permitted: &str| {
            let links = host().uplinks(&ranges(permitted));
            links.into_iter().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(names("8.0.0.0/8"), "eth0 wlan0");
        assert_eq!(names("10.1.0.0/16"), "eth0 tun0 wlan0");
        assert!(host().uplinks(&[]).is_empty());
    }

    #[test]
    fn a_route_or_an_address_within_the_subnets_is_a_conflict() {
        let reason = host()
            .conflict(Subnets::DEFAULT)
            .expect("10.0.0.0/8 has a route");
        assert!(reason.contains("route 10.0.0.0/8 (tun0)"), "{reason}");
        let alone = Surroundings {
            routes: vec![route("0.0.0.0/0", "eth0")],
            ..Surroundings::default()
        };
        assert_eq!(alone.conflict(Subnets::DEFAULT), None);
        for (destination, kind, word) in [
            ("10.11.200.0/24", RouteKind::Unicast, "route"),
            ("10.12.0.9/32", RouteKind::Local, "address"),
            ("10.8.0.0/13", RouteKind::Nowhere, "route"),
        ] {
            let mut host = alone.clone();
            host.routes.push(Route {
                kind,
                ..route(destination, "eth1")
            });
            let reason = host.conflict(Subnets::DEFAULT).expect(destination);
            assert!(
                reason.contains(&format!("{word} {destination}")),
                "{reason}"
            );
        }
    }

    #[test]
    fn own_addresses_are_recognized() {
        for (address, own) in [
            ("192.168.1.7", true),
            ("127.0.0.53", true),
            ("192.168.1.1", false),
        ] {
            let address = address.parse().expect("an address");
            assert_eq!(host().is_own_address(address), own, "{address}");
        }
    }
}
