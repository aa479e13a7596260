//! Addresses that a sandbox may reach, as ranges for the packet filter.
//!
//! Precedence: the host's [`Ceiling`] > `allow` > `deny` > the default policy (`egress`). The packet
//! filter receives the result as disjoint, non-adjacent ranges, so one rule is enough for any pair
//! of lists.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::{
    ceiling::Ceiling,
    ranges::{Range, intersection, joined, ranges_of, without},
};

/// Maximum number of entries in `allow` and `deny` together.
pub(crate) const MAX_ENTRIES: usize = 256;

/// Rejection of an access list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum AccessError {
    /// An entry is neither an IPv4 address nor a CIDR block.
    #[error("`{list}`: `{entry}` is not an IPv4 address or CIDR block")]
    Entry { list: &'static str, entry: String },
    /// The lists have too many entries together.
    #[error(
        "`network`: `allow` and `deny` have {0} entries together, the maximum is {MAX_ENTRIES}"
    )]
    TooMany(usize),
}

/// Egress policy of one sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Access {
    /// Default policy. If true, every address outside `deny` is open; otherwise none is.
    pub(crate) egress: bool,
    allow: Vec<Ipv4Net>,
    deny: Vec<Ipv4Net>,
}

impl Access {
    /// Policy that permits everything or nothing, without exceptions.
    #[cfg(test)]
    pub(crate) fn plain(egress: bool) -> Self {
        Self {
            egress,
            ..Self::default()
        }
    }

    /// Parses the lists of a request or of a sandbox specification.
    pub(crate) fn parse(
        egress: bool,
        allow: &[String],
        deny: &[String],
    ) -> Result<Self, AccessError> {
        let entries = allow.len() + deny.len();
        if entries > MAX_ENTRIES {
            return Err(AccessError::TooMany(entries));
        }
        Ok(Self {
            egress,
            allow: blocks("network.allow", allow)?,
            deny: blocks("network.deny", deny)?,
        })
    }

    /// Returns the exceptions, `allow` then `deny`, as text that [`parse`](Self::parse) accepts.
    pub(crate) fn lists(&self) -> (Vec<String>, Vec<String>) {
        let texts = |blocks: &[Ipv4Net]| blocks.iter().map(text_of).collect();
        (texts(&self.allow), texts(&self.deny))
    }

    /// Returns the exceptions that open addresses.
    pub(super) fn allowed(&self) -> &[Ipv4Net] {
        &self.allow
    }

    /// True if the lists permit `address`, regardless of the host's ceiling.
    pub(super) fn asks_for(&self, address: Ipv4Addr) -> bool {
        let has = |blocks: &[Ipv4Net]| blocks.iter().any(|block| block.contains(&address));
        has(&self.allow) || (self.egress && !has(&self.deny))
    }

    /// Returns all ranges that both the lists and the ceiling permit, sorted and non-adjacent.
    pub(super) fn permitted(&self, ceiling: &Ceiling) -> Vec<Range> {
        let mut open = match self.egress {
            true => without(&[Range::ALL], &ranges_of(&self.deny)),
            false => Vec::new(),
        };
        open.extend(ranges_of(&self.allow));
        intersection(&joined(open), &ceiling.permitted())
    }
}

fn blocks(list: &'static str, texts: &[String]) -> Result<Vec<Ipv4Net>, AccessError> {
    let read = |text: &String| {
        parse_block(text).ok_or_else(|| AccessError::Entry {
            list,
            entry: text.chars().take(80).collect(),
        })
    };
    texts.iter().map(read).collect()
}

/// Parses `1.2.3.4` or `1.2.3.0/24`. Bits after the prefix are dropped, as routers do.
fn parse_block(text: &str) -> Option<Ipv4Net> {
    let address = text.split_once('/').map_or(text, |(address, _)| address);
    // `ipnet` reads `010.0.0.1` as decimal, other programs read it as octal. std rejects it.
    let single: Ipv4Addr = address.parse().ok()?;
    match address == text {
        true => Some(single.into()),
        false => Some(text.parse::<Ipv4Net>().ok()?.trunc()),
    }
}

/// Returns a block as text that [`parse_block`] accepts; without the prefix if it is one address.
fn text_of(block: &Ipv4Net) -> String {
    match block.prefix_len() {
        32 => block.addr().to_string(),
        _ => block.to_string(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::network::{addresses::Subnets, ceiling::EgressCeiling};
    use proptest::prelude::*;
    use wrenn_model::EgressLimit;

    fn access(egress: bool, allow: &[&str], deny: &[&str]) -> Access {
        let texts = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        Access::parse(egress, &texts(allow), &texts(deny)).unwrap()
    }

    fn ranges(access: &Access) -> String {
        let any = ceiling(EgressLimit::Any);
        let texts: Vec<_> = access
            .permitted(&any)
            .iter()
            .map(Range::to_string)
            .collect();
        texts.join(" ")
    }

    fn ceiling(limit: EgressLimit) -> Ceiling {
        let setting = EgressCeiling {
            limit,
            ..EgressCeiling::default()
        };
        Ceiling::new(setting, Subnets::DEFAULT)
    }

    fn reaches(access: &Access, limit: EgressLimit, address: &str) -> bool {
        let address = address.parse::<Ipv4Addr>().unwrap().to_bits();
        let permitted = access.permitted(&ceiling(limit));
        permitted.iter().any(|range| range.holds(address))
    }

    #[test]
    fn nothing_everything_and_exceptions() {
        assert_eq!(ranges(&access(false, &[], &["0.0.0.0/0"])), "");
        assert_eq!(
            ranges(&access(false, &["1.2.3.4", "8.8.8.0/24"], &[])),
            "1.2.3.4 8.8.8.0-8.8.8.255"
        );
        assert_eq!(
            ranges(&access(true, &[], &[])),
            "1.0.0.0-10.10.255.255 10.13.0.0-126.255.255.255 128.0.0.0-169.253.255.255 169.255.0.0-223.255.255.255"
        );
        let some = access(true, &["8.8.8.8"], &["0.0.0.0/0"]);
        assert_eq!(ranges(&some), "8.8.8.8");
        let all_but = access(
            true,
            &["8.8.8.8"],
            &["1.0.0.0/8", "8.0.0.0/7", "64.0.0.0/2", "128.0.0.0/1"],
        );
        assert_eq!(
            ranges(&all_but),
            "2.0.0.0-7.255.255.255 8.8.8.8 10.0.0.0-10.10.255.255 10.13.0.0-63.255.255.255"
        );
    }

    #[test]
    fn no_list_opens_what_the_ceiling_closes() {
        let greedy = access(true, &["0.0.0.0/0", "169.254.169.254", "10.11.0.3"], &[]);
        for (address, public, any) in [
            ("169.254.169.254", false, false),
            ("10.11.0.3", false, false),
            ("10.12.0.1", false, false),
            ("127.0.0.1", false, false),
            ("255.255.255.255", false, false),
            ("192.168.1.1", false, true),
            ("100.100.100.200", false, true),
            ("1.1.1.1", true, true),
        ] {
            let reached = |limit| reaches(&greedy, limit, address);
            let found = (reached(EgressLimit::Public), reached(EgressLimit::Any));
            assert_eq!(found, (public, any), "{address}");
            assert!(!reached(EgressLimit::Never), "{address}");
        }
    }

    #[test]
    fn bits_behind_the_prefix_are_dropped() {
        let access = access(false, &["10.99.1.77/24"], &[]);
        assert_eq!(access.lists().0, ["10.99.1.0/24"]);
    }

    #[test]
    fn what_is_no_address_is_named_with_its_list() {
        for wrong in [
            "",
            "1.2.3",
            "1.2.3.4/33",
            "1.2.3.4/",
            "1.2.3.4/+8",
            "010.0.0.1/8",
            "::1",
            "example.com",
            "1.2.3.4; drop",
        ] {
            let error = Access::parse(true, &[], &[wrong.to_owned()]).unwrap_err();
            assert!(error.to_string().starts_with("`network.deny`: "), "{error}");
        }
        let many = vec!["1.1.1.1".to_owned(); MAX_ENTRIES];
        assert!(Access::parse(true, &many, &[]).is_ok());
        let error = Access::parse(true, &many, &many[..1]).unwrap_err();
        assert_eq!(error, AccessError::TooMany(MAX_ENTRIES + 1));
    }

    fn any_block() -> impl Strategy<Value = String> {
        // Few values per octet, so that blocks are likely to overlap, touch and contain each other.
        let octet = prop_oneof![
            Just(0_u8),
            Just(10),
            Just(11),
            Just(127),
            Just(169),
            Just(254),
            Just(255),
            any::<u8>()
        ];
        let prefix = prop_oneof![0..=32_u8, Just(32)];
        ([octet.clone(), octet.clone(), octet.clone(), octet], prefix)
            .prop_map(|([a, b, c, d], prefix)| format!("{a}.{b}.{c}.{d}/{prefix}"))
    }

    fn any_access() -> impl Strategy<Value = Access> {
        let list = || proptest::collection::vec(any_block(), 0..12);
        (any::<bool>(), list(), list())
            .prop_map(|(egress, allow, deny)| Access::parse(egress, &allow, &deny).unwrap())
    }

    proptest! {
        #[test]
        fn ranges_hold_what_the_definition_says(access in any_access(), others in proptest::collection::vec(any::<u32>(), 20)) {
            let ceiling = ceiling(EgressLimit::Any);
            let (permitted, most) = (access.permitted(&ceiling), ceiling.permitted());
            let edges = access.allow.iter().chain(&access.deny).map(Range::from).chain(most.iter().copied());
            let around = |at: u32| [at.wrapping_sub(1), at, at.wrapping_add(1)];
            let edges: Vec<u32> = edges.flat_map(|r| [around(r.first), around(r.last)]).flatten().collect();
            for address in edges.into_iter().chain(others) {
                let held = permitted.iter().any(|range| range.holds(address));
                let expected = access.asks_for(Ipv4Addr::from_bits(address))
                    && most.iter().any(|range| range.holds(address));
                prop_assert_eq!(held, expected, "{}", Ipv4Addr::from_bits(address));
            }
        }

        #[test]
        fn ranges_are_sorted_and_do_not_touch(access in any_access()) {
            let permitted = access.permitted(&ceiling(EgressLimit::Public));
            prop_assert!(permitted.iter().all(|range| range.first <= range.last));
            for pair in permitted.windows(2) {
                prop_assert!(pair[0].last.checked_add(1).is_some_and(|next| next < pair[1].first));
            }
        }

        #[test]
        fn lists_survive_as_text(access in any_access()) {
            let (allow, deny) = access.lists();
            prop_assert_eq!(Access::parse(access.egress, &allow, &deny).unwrap(), access);
        }

        #[test]
        fn any_text_is_a_block_or_is_refused(text in "\\PC{0,24}") {
            if let Some(block) = parse_block(&text) {
                prop_assert_eq!(parse_block(&text_of(&block)), Some(block));
            }
        }
    }
}
