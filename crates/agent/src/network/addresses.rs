//! Names and addresses of a network slot.
//!
//! All of them are derived from the slot number, so nothing must be stored to find or remove the
//! resources of a slot. Arithmetic uses `u32`, because a wrapped address would belong to another
//! sandbox.

use std::{net::Ipv4Addr, path::PathBuf};

/// Directory of named network namespaces, the same as for `ip netns`.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// Name of the link from a sandbox's namespace to the host.
pub(crate) const UPLINK: &str = "eth0";

/// Name prefix of all links from the host to sandboxes.
pub(crate) const VETH_PREFIX: &str = "wrenn-v";

/// `10.11.0.0`: base of the addresses at which the host reaches guests.
const GUEST_BASE: u32 = u32::from_be_bytes([10, 11, 0, 0]);

/// `10.12.0.0`: base of the links between the host and the namespaces, two addresses per link.
const LINK_BASE: u32 = u32::from_be_bytes([10, 12, 0, 0]);

/// First user ID for VMMs. Above the ranges that distributions, containers and directory services
/// assign, and below 2^31.
const UID_BASE: u32 = 1_900_000_000;

/// Number of a network slot, 1 to [`Slot::MAX`]. Unique on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Slot(u16);

impl Slot {
    /// Highest slot number. Its link has the last two addresses of 10.12.0.0/16.
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

    /// Address at which the host reaches the guest.
    pub(crate) fn host_ip(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(GUEST_BASE + u32::from(self.0))
    }

    /// Address of the host's end of the link.
    pub(crate) fn link_host(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(LINK_BASE + 2 * u32::from(self.0))
    }

    /// Address of the namespace's end of the link.
    pub(crate) fn link_peer(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(LINK_BASE + 2 * u32::from(self.0) + 1)
    }

    /// Name of the host's end of the link.
    pub(crate) fn veth(self) -> String {
        format!("{VETH_PREFIX}{}", self.0)
    }

    /// Path of the network namespace.
    pub(crate) fn netns(self) -> PathBuf {
        PathBuf::from(format!("{NETNS_DIR}/wrenn-ns-{}", self.0))
    }

    /// User and group ID of the slot's VMM.
    pub(crate) fn uid(self) -> u32 {
        UID_BASE + u32::from(self.0)
    }
}

impl std::fmt::Display for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn no_two_slots_share_an_address_and_all_are_in_range() {
        let mut guests = HashSet::new();
        let mut links = HashSet::new();
        for slot in Slot::all() {
            assert!(guests.insert(slot.host_ip()), "slot {slot}");
            assert!(links.insert(slot.link_host()), "slot {slot}");
            assert!(links.insert(slot.link_peer()), "slot {slot}");
        }
        assert_eq!(guests.len(), usize::from(Slot::MAX));
        assert!(guests.iter().all(|ip| ip.octets()[..2] == [10, 11]));
        assert!(links.iter().all(|ip| ip.octets()[..2] == [10, 12]));
    }

    #[test]
    fn the_last_slot_has_the_last_link() {
        let last = Slot::new(Slot::MAX).unwrap();
        assert_eq!(last.link_peer(), Ipv4Addr::new(10, 12, 255, 255));
        assert_eq!(last.host_ip(), Ipv4Addr::new(10, 11, 127, 255));
        assert!(last.uid() < 1 << 31);
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
                prop_assert_eq!(slot.link_host().to_bits() ^ slot.link_peer().to_bits(), 1);
                prop_assert_eq!(slot.link_host().to_bits() & 1, 0);
            }
        }
    }
}
