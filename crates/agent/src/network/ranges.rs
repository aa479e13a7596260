//! Sets of IPv4 addresses as sorted ranges: union, difference and intersection.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

/// Range of addresses, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Range {
    pub(super) first: u32,
    pub(super) last: u32,
}

impl From<&Ipv4Net> for Range {
    fn from(block: &Ipv4Net) -> Self {
        Self {
            first: block.network().to_bits(),
            last: block.broadcast().to_bits(),
        }
    }
}

impl Range {
    pub(super) const ALL: Self = Self {
        first: 0,
        last: u32::MAX,
    };

    pub(super) fn holds(self, address: u32) -> bool {
        (self.first..=self.last).contains(&address)
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (first, last) = (
            Ipv4Addr::from_bits(self.first),
            Ipv4Addr::from_bits(self.last),
        );
        match first == last {
            true => first.fmt(f),
            false => write!(f, "{first}-{last}"),
        }
    }
}

/// Returns the same addresses as sorted, non-overlapping, non-adjacent ranges.
pub(super) fn joined(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable();
    let mut out: Vec<Range> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if range.first <= last.last.saturating_add(1) => {
                last.last = last.last.max(range.last);
            }
            _ => out.push(range),
        }
    }
    out
}

/// Returns the addresses in `ranges` that are not in `holes`. Both inputs must be [`joined`], and
/// so is the result.
pub(super) fn without(ranges: &[Range], holes: &[Range]) -> Vec<Range> {
    let mut out = Vec::new();
    for range in ranges {
        let mut next = Some(range.first);
        for hole in holes {
            let Some(first) = next.filter(|_| hole.first <= range.last) else {
                break;
            };
            if hole.last < first {
                continue;
            }
            if hole.first > first {
                let last = hole.first - 1;
                out.push(Range { first, last });
            }
            next = hole.last.checked_add(1).filter(|next| *next <= range.last);
        }
        if let Some(first) = next {
            let last = range.last;
            out.push(Range { first, last });
        }
    }
    out
}

/// Returns the addresses of `blocks` as sorted, non-overlapping, non-adjacent ranges.
pub(super) fn ranges_of<'a>(blocks: impl IntoIterator<Item = &'a Ipv4Net>) -> Vec<Range> {
    joined(blocks.into_iter().map(Range::from).collect())
}

/// Returns the addresses that are in both inputs, which must be [`joined`], and so is the result.
pub(super) fn intersection(a: &[Range], b: &[Range]) -> Vec<Range> {
    without(a, &without(&[Range::ALL], b))
}

/// Returns ranges as the content of an nftables set.
pub(super) fn elements(ranges: &[Range]) -> String {
    let texts: Vec<_> = ranges.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_ranges() -> impl Strategy<Value = Vec<Range>> {
        // Few edges, so that ranges are likely to overlap and touch.
        let edge = prop_oneof![0..20_u32, (u32::MAX - 20)..=u32::MAX];
        let range = (edge.clone(), edge).prop_map(|(a, b)| Range {
            first: a.min(b),
            last: a.max(b),
        });
        proptest::collection::vec(range, 0..8).prop_map(joined)
    }

    fn has(ranges: &[Range], address: u32) -> bool {
        ranges.iter().any(|range| range.holds(address))
    }

    proptest! {
        #[test]
        fn an_address_is_in_the_result_if_the_definition_says_so(a in any_ranges(), b in any_ranges()) {
            let (both, only_a) = (intersection(&a, &b), without(&a, &b));
            for address in (0..25).chain((u32::MAX - 25)..=u32::MAX) {
                let (in_a, in_b) = (has(&a, address), has(&b, address));
                prop_assert_eq!(has(&both, address), in_a && in_b);
                prop_assert_eq!(has(&only_a, address), in_a && !in_b);
            }
        }
    }
}
