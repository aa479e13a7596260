//! Names and addresses of a network slot.
//!
//! The names are derived from the slot number, so nothing must be stored to find or remove the
//! resources of a slot. The addresses are derived from the slot number and the [`Subnets`] that the
//! agent had when it created the network. A running sandbox keeps its addresses when a later agent
//! has other subnets. Arithmetic uses `u32`, because a wrapped address would belong to another
//! sandbox.

use std::{net::Ipv4Addr, path::PathBuf};

use ipnet::Ipv4Net;

/// Directory of named network namespaces, the same as for `ip netns`.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// Name of the link from a sandbox's namespace to the host.
pub(crate) const UPLINK: &str = "eth0";

/// Name prefix of all links from the host to sandboxes.
pub(crate) const VETH_PREFIX: &str = "wrenn-v";

/// First user ID for VMMs. Above the ranges that distributions, containers and directory services
/// assign, and below 2^31.
const UID_BASE: u32 = 1_900_000_000;

/// Number of a network slot, 1 to [`Slot::MAX`]. Unique on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Slot(u16);

impl Slot {
    /// Highest slot number. Its link has the last two addresses of the links' subnet.
    pub(crate) const MAX: u16 = 32_767;

    /// Returns the slot with this number, or `None` if the number is out of range.
    pub(crate) const fn new(number: u16) -> Option<Self> {
        if number >= 1 && number <= Self::MAX {
            Some(Self(number))
        } else {
            None
        }
    }

    /// Returns all slots in ascending order.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (1..=Self::MAX).map(Self)
    }

    pub(crate) const fn number(self) -> u16 {
        self.0
    }

    /// Name of the host's end of the link.
    pub(crate) fn veth(self) -> String {
        format!("{VETH_PREFIX}{}", self.0)
    }

    /// Returns the slot whose link has this name.
    pub(crate) fn of_veth(link: &str) -> Option<Self> {
        Self::new(link.strip_prefix(VETH_PREFIX)?.parse().ok()?)
    }

    /// Path of the network namespace.
    pub(crate) fn netns(self) -> PathBuf {
        PathBuf::from(format!("{NETNS_DIR}/wrenn-ns-{}", self.0))
    }

    /// User and group ID of the slot's VMM.
    pub(crate) fn uid(self) -> u32 {
        UID_BASE + u32::from(self.0)
    }

    /// User and group ID of the process that presents the disk to the slot's VMM.
    pub(crate) fn exporter_uid(self) -> u32 {
        UID_BASE + u32::from(Self::MAX) + 1 + u32::from(self.0)
    }
}

impl std::fmt::Display for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Address ranges of all sandboxes of a host: one address per guest, two per link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnets {
    guests: Ipv4Net,
    links: Ipv4Net,
}

/// Rejection of a pair of subnets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubnetsError {
    /// A subnet has too few addresses for all slots.
    #[error("{0} is too small; the guests' subnet needs at least a /17, the links' subnet a /16")]
    Small(Ipv4Net),
    /// The subnets have addresses in common.
    #[error("{0} and {1} overlap")]
    Overlap(Ipv4Net, Ipv4Net),
}

impl Subnets {
    /// The subnets of release 0.1.0, and the first choice of later ones.
    pub const DEFAULT: Self = Self {
        guests: Ipv4Net::new_assert(Ipv4Addr::new(10, 11, 0, 0), 16),
        links: Ipv4Net::new_assert(Ipv4Addr::new(10, 12, 0, 0), 16),
    };

    /// Returns subnets for guests and for links. Bits after the prefixes are dropped.
    ///
    /// # Errors
    /// A subnet is too small, or they overlap.
    pub fn new(guests: Ipv4Net, links: Ipv4Net) -> Result<Self, SubnetsError> {
        let (guests, links) = (guests.trunc(), links.trunc());
        if guests.prefix_len() > 17 {
            return Err(SubnetsError::Small(guests));
        }
        if links.prefix_len() > 16 {
            return Err(SubnetsError::Small(links));
        }
        if guests.contains(&links) || links.contains(&guests) {
            return Err(SubnetsError::Overlap(guests, links));
        }
        Ok(Self { guests, links })
    }

    /// Returns both subnets: that of the guests, then that of the links.
    pub const fn blocks(&self) -> [Ipv4Net; 2] {
        [self.guests, self.links]
    }

    /// Address at which the host reaches the guest.
    pub(crate) fn host_ip(&self, slot: Slot) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.guests.network().to_bits() + u32::from(slot.0))
    }

    /// Address of the host's end of the link.
    pub(crate) fn link_host(&self, slot: Slot) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.links.network().to_bits() + 2 * u32::from(slot.0))
    }

    /// Address of the namespace's end of the link.
    pub(crate) fn link_peer(&self, slot: Slot) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.links.network().to_bits() + 2 * u32::from(slot.0) + 1)
    }
}

impl std::fmt::Display for Subnets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} and {}", self.guests, self.links)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn subnets(guests: &str, links: &str) -> Result<Subnets, SubnetsError> {
        Subnets::new(guests.parse().unwrap(), links.parse().unwrap())
    }

    #[test]
    fn no_two_slots_share_an_address_and_all_are_in_range() {
        for subnets in [
            Subnets::DEFAULT,
            subnets("172.31.128.0/17", "198.19.0.0/16").unwrap(),
        ] {
            let (mut guests, mut links) = (HashSet::new(), HashSet::new());
            for slot in Slot::all() {
                assert!(guests.insert(subnets.host_ip(slot)), "slot {slot}");
                assert!(links.insert(subnets.link_host(slot)), "slot {slot}");
                assert!(links.insert(subnets.link_peer(slot)), "slot {slot}");
            }
            assert_eq!(guests.len(), usize::from(Slot::MAX));
            let [guest_block, link_block] = subnets.blocks();
            assert!(guests.iter().all(|ip| guest_block.contains(ip)));
            assert!(links.iter().all(|ip| link_block.contains(ip)));
        }
    }

    #[test]
    fn the_last_slot_has_the_last_link() {
        let last = Slot::new(Slot::MAX).unwrap();
        let subnets = Subnets::DEFAULT;
        assert_eq!(subnets.link_peer(last), Ipv4Addr::new(10, 12, 255, 255));
        assert_eq!(subnets.host_ip(last), Ipv4Addr::new(10, 11, 127, 255));
        assert!(last.uid() < last.exporter_uid() && last.exporter_uid() < 1 << 31);
        let first = Slot::all().next().expect("there are slots");
        assert!(first.exporter_uid() > last.uid());
    }

    #[test]
    fn subnets_that_are_too_small_or_overlap_are_rejected() {
        for (guests, links) in [
            ("10.0.0.0/18", "10.12.0.0/16"),
            ("10.11.0.0/16", "10.12.0.0/17"),
            ("10.0.0.0/8", "10.12.0.0/16"),
            ("10.12.0.0/17", "10.12.0.0/16"),
        ] {
            assert!(subnets(guests, links).is_err(), "{guests} {links}");
        }
        let kept = subnets("10.11.3.4/16", "10.12.0.1/16").unwrap();
        assert_eq!(kept, Subnets::DEFAULT);
    }

    proptest! {
        #[test]
        fn a_slot_is_a_number_from_1_to_the_last(number: u16) {
            let slot = Slot::new(number);
            prop_assert_eq!(slot.is_some(), (1..=Slot::MAX).contains(&number));
            if let Some(slot) = slot {
                // An interface name has at most 15 bytes.
                prop_assert!(slot.veth().len() <= 15);
                // The two ends form a /31: they differ only in the last bit.
                let (host, peer) = (Subnets::DEFAULT.link_host(slot), Subnets::DEFAULT.link_peer(slot));
                prop_assert_eq!(host.to_bits() ^ peer.to_bits(), 1);
                prop_assert_eq!(host.to_bits() & 1, 0);
            }
        }
    }
}
