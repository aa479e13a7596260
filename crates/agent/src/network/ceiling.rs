//! Most that any sandbox of this host may reach, as the operator of the host decides.
//!
//! | precedence | ranges                                             | decided by                     |
//! |------------|----------------------------------------------------|--------------------------------|
//! | 1          | [`RESERVED`] and the sandboxes' own: always closed | -                              |
//! | 2          | `closed`                                           | operator                       |
//! | 3          | `open`                                             | operator                       |
//! | 4          | all other addresses                                | `limit`: none, public ones, all |
//!
//! The host itself is closed as well, whatever its addresses are: the host's rules recognize them
//! ([`super::rules`]). With [`EgressLimit::Public`], so are the networks that the host is directly
//! connected to, even if their addresses are public.
//!
//! A client's request selects from what the ceiling permits. A request that names only addresses
//! above the ceiling is rejected; the ceiling is never exceeded silently. Sandboxes that exist keep
//! their lists when the ceiling is lowered, and reach what both permit.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use wrenn_model::EgressLimit;

use super::{
    addresses::Subnets,
    egress::Access,
    ranges::{Range, intersection, joined, ranges_of, without},
};

/// Addresses that no sandbox may reach: link-local addresses with the metadata services of clouds,
/// loopback, unspecified, multicast and reserved addresses.
const RESERVED: [Ipv4Net; 4] = [
    block(169, 254, 0, 0, 16),
    block(127, 0, 0, 0, 8),
    block(0, 0, 0, 0, 8),
    block(224, 0, 0, 0, 3),
];

/// Addresses that are not public: private and shared ones, protocol assignments (IANA IPv4
/// Special-Purpose Address Registry), which include the metadata services of Alibaba
/// (100.100.100.200) and Oracle (192.0.0.192), and that of Azure, which has a public address.
const NOT_PUBLIC: [Ipv4Net; 6] = [
    block(10, 0, 0, 0, 8),
    block(100, 64, 0, 0, 10),
    block(168, 63, 129, 16, 32),
    block(172, 16, 0, 0, 12),
    block(192, 0, 0, 0, 24),
    block(192, 168, 0, 0, 16),
];

/// Ranges for documentation (RFC 5737) and benchmarks (RFC 2544). They count as public, also if the
/// host is a part of such a network: no machine that needs protection has such an address, and
/// proxies and tests use them in the place of the internet.
const STAND_INS: [Ipv4Net; 4] = [
    block(192, 0, 2, 0, 24),
    block(198, 18, 0, 0, 15),
    block(198, 51, 100, 0, 24),
    block(203, 0, 113, 0, 24),
];

const fn block(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

/// Setting of the operator: the most that any sandbox of this host may reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EgressCeiling {
    /// Addresses outside `open` and `closed` that may be reached.
    pub limit: EgressLimit,
    /// Ranges that may be reached although `limit` does not permit them.
    pub open: Vec<Ipv4Net>,
    /// Ranges that may not be reached, even if `open` contains them.
    pub closed: Vec<Ipv4Net>,
}

/// Rejection of a request that exceeds the ceiling.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum CeilingError {
    /// The request asks for network access, and the operator permits none.
    #[error("`egress`: the operator of this host permits no network access (`WRENN_EGRESS_LIMIT`)")]
    Nothing,
    /// The request names an address or a range that the operator does not permit.
    #[error(
        "`network.allow`: the operator of this host does not permit access to `{entry}`: {reason}"
    )]
    Entry {
        entry: Ipv4Net,
        reason: &'static str,
    },
}

/// Ceiling of a host.
#[derive(Debug, Clone)]
pub(crate) struct Ceiling {
    setting: EgressCeiling,
    /// Addresses of this host's sandboxes.
    subnets: Subnets,
}

impl Ceiling {
    /// Returns the ceiling of a host whose sandboxes have addresses in `subnets`.
    pub(super) const fn new(setting: EgressCeiling, subnets: Subnets) -> Self {
        Self { setting, subnets }
    }

    /// Rejects a request that asks for something above the ceiling only. An entry that the ceiling
    /// permits in part is accepted, and opens that part.
    pub(crate) fn check(&self, access: &Access) -> Result<(), CeilingError> {
        let permitted = self.permitted();
        if access.egress && permitted.is_empty() {
            return Err(CeilingError::Nothing);
        }
        for entry in access.allowed() {
            if intersection(&[Range::from(entry)], &permitted).is_empty() {
                let (entry, reason) = (*entry, self.reason(entry));
                return Err(CeilingError::Entry { entry, reason });
            }
        }
        Ok(())
    }

    /// Returns the reason why the ceiling does not permit any address of `entry`.
    fn reason(&self, entry: &Ipv4Net) -> &'static str {
        let entry = [Range::from(entry)];
        if without(&entry, &self.reserved()).is_empty() {
            return "addresses of the host, link-local addresses and other sandboxes are always closed";
        }
        if without(&entry, &ranges_of(&self.setting.closed)).is_empty() {
            return "it is closed by `WRENN_EGRESS_CLOSED`";
        }
        match self.setting.limit {
            EgressLimit::Public => {
                "of private, shared and metadata addresses, only those in `WRENN_EGRESS_OPEN` are permitted"
            }
            EgressLimit::Never | EgressLimit::Any => {
                "only addresses in `WRENN_EGRESS_OPEN` are permitted"
            }
        }
    }

    /// Returns all permitted ranges, sorted and non-adjacent.
    pub(super) fn permitted(&self) -> Vec<Range> {
        self.permitted_beside(&[])
    }

    /// Same as [`permitted`](Self::permitted), without the networks that the host is directly
    /// connected to, unless the operator opened them.
    pub(super) fn permitted_beside(&self, neighbours: &[Ipv4Net]) -> Vec<Range> {
        let mut open = match self.setting.limit {
            EgressLimit::Never => Vec::new(),
            EgressLimit::Public => {
                let stands_in =
                    |network: &&Ipv4Net| STAND_INS.iter().any(|range| range.contains(*network));
                let closed = neighbours.iter().filter(|network| !stands_in(network));
                without(&[Range::ALL], &ranges_of(NOT_PUBLIC.iter().chain(closed)))
            }
            EgressLimit::Any => vec![Range::ALL],
        };
        open.extend(ranges_of(&self.setting.open));
        let open = without(&joined(open), &ranges_of(&self.setting.closed));
        without(&open, &self.reserved())
    }

    /// True if sandboxes may send DNS requests to a nameserver of the host. The nameserver need not
    /// have a public address: most networks have their own.
    pub(super) fn permits_nameserver(&self, address: Ipv4Addr) -> bool {
        let address = address.to_bits();
        let has = |ranges: &[Range]| ranges.iter().any(|range| range.holds(address));
        !has(&ranges_of(&self.setting.closed)) && !has(&self.reserved())
    }

    fn reserved(&self) -> Vec<Range> {
        ranges_of(RESERVED.iter().chain(&self.subnets.blocks()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn ceiling(limit: EgressLimit, open: &[&str], closed: &[&str]) -> Ceiling {
        let nets = |list: &[&str]| list.iter().map(|text| text.parse().unwrap()).collect();
        let (open, closed) = (nets(open), nets(closed));
        let setting = EgressCeiling {
            limit,
            open,
            closed,
        };
        Ceiling::new(setting, Subnets::DEFAULT)
    }

    fn access(egress: bool, allow: &[&str]) -> Access {
        let allow: Vec<_> = allow.iter().map(|&text| text.to_owned()).collect();
        Access::parse(egress, &allow, &[]).unwrap()
    }

    fn permits(ceiling: &Ceiling, address: &str) -> bool {
        let address = address.parse::<Ipv4Addr>().unwrap().to_bits();
        let permitted = ceiling.permitted();
        permitted.iter().any(|range| range.holds(address))
    }

    #[test]
    fn without_settings_only_public_addresses_are_permitted() {
        let ceiling = ceiling(EgressLimit::default(), &[], &[]);
        for closed in [
            "10.0.0.1",
            "172.16.0.1",
            "172.31.255.254",
            "192.168.0.1",
            "100.64.0.1",
            "100.100.100.200",
            "192.0.0.192",
            "168.63.129.16",
            "169.254.169.254",
            "127.0.0.1",
            "224.0.0.1",
            "255.255.255.255",
        ] {
            assert!(!permits(&ceiling, closed), "{closed}");
        }
        for open in [
            "1.1.1.1",
            "172.32.0.1",
            "100.128.0.1",
            "168.63.129.15",
            "192.0.2.1",
            "198.18.0.1",
        ] {
            assert!(permits(&ceiling, open), "{open}");
        }
    }

    #[test]
    fn the_operator_opens_ranges_and_what_it_closes_is_closed() {
        let opened = ceiling(
            EgressLimit::Public,
            &["10.1.0.0/16"],
            &["10.1.2.0/24", "8.8.8.8/32"],
        );
        for (address, open) in [
            ("10.1.0.1", true),
            ("10.1.2.1", false),
            ("10.2.0.1", false),
            ("8.8.8.8", false),
            ("8.8.4.4", true),
        ] {
            assert_eq!(permits(&opened, address), open, "{address}");
        }
        let only = ceiling(EgressLimit::Never, &["10.1.0.0/16"], &[]);
        assert!(permits(&only, "10.1.0.1") && !permits(&only, "8.8.4.4"));
        // Reserved addresses and those of sandboxes cannot be opened.
        let all = ceiling(EgressLimit::Any, &["0.0.0.0/0"], &[]);
        assert!(!permits(&all, "169.254.169.254") && !permits(&all, "10.11.0.1"));
        assert!(permits(&all, "192.168.0.1"));
    }

    #[test]
    fn networks_beside_the_host_are_closed_unless_they_are_opened() {
        let beside = ["8.8.8.0/24".parse().unwrap()];
        let address = Ipv4Addr::new(8, 8, 8, 8).to_bits();
        for (limit, open, expected) in [
            (EgressLimit::Public, &[][..], false),
            (EgressLimit::Public, &["8.8.8.0/29"][..], false),
            (EgressLimit::Public, &["8.8.8.8/32"][..], true),
            (EgressLimit::Any, &[][..], true),
        ] {
            let permitted = ceiling(limit, open, &[]).permitted_beside(&beside);
            let held = permitted.iter().any(|range| range.holds(address));
            assert_eq!(held, expected, "{limit} {open:?}");
        }
        let stand_in = "198.19.255.0/30".parse().unwrap();
        let permitted = ceiling(EgressLimit::Public, &[], &[]).permitted_beside(&[stand_in]);
        let address = stand_in.network().to_bits() + 1;
        assert!(permitted.iter().any(|range| range.holds(address)));
    }

    #[test]
    fn a_request_above_the_ceiling_is_rejected_with_the_reason() {
        let error = |ceiling: &Ceiling, access: &Access| match ceiling.check(access) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        let never = ceiling(EgressLimit::Never, &[], &[]);
        assert!(error(&never, &access(true, &[])).contains("`egress`: "));
        assert_eq!(error(&never, &access(false, &[])), "");
        let public = ceiling(EgressLimit::Public, &[], &["9.9.9.9/32"]);
        for (entry, reason) in [
            ("10.0.0.5", "`10.0.0.5/32`: of private"),
            ("9.9.9.9", "WRENN_EGRESS_CLOSED"),
            ("169.254.169.254", "always closed"),
            ("10.11.0.7", "always closed"),
        ] {
            let error = error(&public, &access(false, &[entry]));
            assert!(
                error.contains(reason) && error.contains("network.allow"),
                "{error}"
            );
        }
        // Clients name everything to say "no restriction".
        assert_eq!(error(&public, &access(true, &["0.0.0.0/0", "8.8.8.8"])), "");
    }

    #[test]
    fn nameservers_may_have_private_addresses() {
        let ceiling = ceiling(EgressLimit::Public, &[], &["192.168.7.0/24"]);
        for (address, permitted) in [
            ("192.168.1.1", true),
            ("192.168.7.1", false),
            ("169.254.169.253", false),
        ] {
            assert_eq!(
                ceiling.permits_nameserver(address.parse().unwrap()),
                permitted
            );
        }
    }
}
