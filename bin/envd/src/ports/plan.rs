//! Selection of the ports that need a forwarder, from the current listeners. No I/O.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::table::Listener;

/// Maximum number of forwarded ports. Listeners beyond this limit are not reachable from outside.
pub const MAX_FORWARDERS: usize = 512;

/// Target of a forwarder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Address of the listener.
    pub address: SocketAddr,
    /// Inode of the listener's socket.
    pub inode: u64,
}

/// Result of one scan of the tables. The value is reused, so that a scan allocates nothing once
/// there is enough capacity.
#[derive(Debug)]
pub struct Plan {
    /// Address that is reachable from outside.
    outside: IpAddr,
    /// Ports with listeners, sorted by number.
    found: Vec<Found>,
}

#[derive(Debug)]
struct Found {
    port: u16,
    inside: Option<Target>,
    is_outside: bool,
}

impl Plan {
    /// Creates a plan for a guest with this address.
    #[must_use]
    pub fn new(outside: IpAddr) -> Self {
        Self {
            outside,
            found: Vec::new(),
        }
    }

    /// Removes the results of the last scan.
    pub fn clear(&mut self) {
        self.found.clear();
    }

    /// Adds a listener. `owned` is true if envd itself forwards the listener's port.
    pub fn add(&mut self, listener: Listener, owned: bool) {
        let Listener {
            address,
            port,
            inode,
        } = listener;
        let inside = address == Ipv4Addr::LOCALHOST || address == Ipv6Addr::LOCALHOST;
        let outside = address.is_unspecified() || (address == self.outside && !owned);
        if !inside && !outside {
            return;
        }
        let at = self.place(port).unwrap_or_else(|at| {
            let found = Found {
                port,
                inside: None,
                is_outside: false,
            };
            self.found.insert(at, found);
            at
        });
        let found = &mut self.found[at];
        found.is_outside |= outside;
        // A server on both loopback addresses is one server. The first address, which is IPv4, is
        // as good as the other.
        if inside && found.inside.is_none() {
            let address = SocketAddr::new(address, port);
            found.inside = Some(Target { address, inode });
        }
    }

    /// Returns the ports that need a forwarder, and their targets.
    pub fn wanted(&self) -> impl Iterator<Item = (u16, Target)> {
        self.found
            .iter()
            .filter(|found| !found.is_outside)
            .filter_map(|found| Some((found.port, found.inside?)))
            .take(MAX_FORWARDERS)
    }

    /// Returns the target of a port's forwarder, if the port needs one.
    #[must_use]
    pub fn target(&self, port: u16) -> Option<Target> {
        let found = &self.found[self.place(port).ok()?];
        found.inside.filter(|_| !found.is_outside)
    }

    fn place(&self, port: u16) -> Result<usize, usize> {
        self.found.binary_search_by_key(&port, |found| found.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OUTSIDE: &str = "169.254.0.21";

    fn plan(listeners: &[(&str, u16)]) -> Vec<(u16, String)> {
        let mut plan = Plan::new(OUTSIDE.parse().expect("an address"));
        for (inode, (address, port)) in (1..).zip(listeners) {
            let listener = Listener {
                address: address.parse().expect("an address"),
                port: *port,
                inode,
            };
            plan.add(listener, false);
        }
        plan.wanted()
            .map(|(port, target)| (port, target.address.to_string()))
            .collect()
    }

    #[test]
    fn only_what_is_not_reachable_is_forwarded() {
        let one = |port, target: &str| vec![(port, target.to_owned())];
        assert_eq!(plan(&[("127.0.0.1", 80)]), one(80, "127.0.0.1:80"));
        assert_eq!(plan(&[("::1", 80)]), one(80, "[::1]:80"));
        assert_eq!(
            plan(&[("127.0.0.1", 80), ("::1", 80)]),
            one(80, "127.0.0.1:80")
        );
        for everywhere in ["0.0.0.0", "::", OUTSIDE] {
            assert_eq!(plan(&[("127.0.0.1", 80), (everywhere, 80)]), []);
            assert_eq!(plan(&[(everywhere, 80), ("::1", 80)]), []);
        }
        // Listeners on other addresses were bound there on purpose.
        assert_eq!(plan(&[("127.0.0.53", 53), ("10.0.0.1", 80)]), []);
    }

    #[test]
    fn our_own_listener_is_no_reason_to_stop() {
        let mut plan = Plan::new(OUTSIDE.parse().expect("an address"));
        for address in [OUTSIDE, "127.0.0.1"] {
            let listener = Listener {
                address: address.parse().expect("an address"),
                port: 80,
                inode: 1,
            };
            plan.add(listener, true);
        }
        assert!(plan.target(80).is_some());
        plan.clear();
        assert!(plan.target(80).is_none());
    }

    proptest! {
        #[test]
        fn the_order_of_listeners_does_not_matter_for_what_is_forwarded(
            list in proptest::collection::vec((0_usize..5, 1_u16..4), 0..12)
        ) {
            let names = ["127.0.0.1", "::1", "0.0.0.0", "::", OUTSIDE];
            let mut listeners: Vec<_> = list.iter().map(|(at, port)| (names[*at], *port)).collect();
            let ports = |all: &[(&str, u16)]| plan(all).into_iter().map(|(port, _)| port).collect::<Vec<_>>();
            let before = ports(&listeners);
            listeners.reverse();
            prop_assert_eq!(before, ports(&listeners));
        }
    }
}
