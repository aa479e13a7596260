//! Addresses of guest memory in the address space of the VMM.
//!
//! The description comes from the VMM and is untrusted: this module checks it completely before any
//! part is used. Arithmetic on checked regions cannot overflow.

use serde::Deserialize;

use crate::PAGE_BYTES;

/// Maximum number of regions per VM. The supported VMMs have one or two.
pub const MAX_REGIONS: usize = 64;

/// Contiguously mapped part of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Address of the first byte in the VMM; a multiple of 4096.
    pub address: u64,
    /// Length, in bytes; a multiple of 4096, not 0.
    pub len: u64,
    /// Offset of the first byte in guest memory; a multiple of 4096.
    pub offset: u64,
}

/// Reason why a description of guest memory is invalid.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// The description is not the expected JSON.
    #[error("failed to decode the description of guest memory")]
    Json(#[source] serde_json::Error),
    /// The number of regions is zero or too large.
    #[error("{0} regions of guest memory, expected 1 to {MAX_REGIONS}")]
    Count(usize),
    /// Neither `page_size` nor `page_size_kib` is present.
    #[error("region {0} has no page size")]
    NoPageSize(usize),
    /// The page size is not supported.
    #[error("region {region} has pages of {bytes} bytes, expected {PAGE_BYTES}")]
    PageSize {
        /// Index of the region, from 0.
        region: usize,
        /// Page size of the region, in bytes.
        bytes: u64,
    },
    /// A field is not a multiple of the page size.
    #[error("`{field}` of region {region} is {value}, not a multiple of {PAGE_BYTES}")]
    Unaligned {
        /// Index of the region, from 0.
        region: usize,
        /// Name of the field, as in the JSON.
        field: &'static str,
        /// Value of the field.
        value: u64,
    },
    /// The region has no bytes.
    #[error("region {0} is empty")]
    Empty(usize),
    /// The region's end does not fit into 64 bits.
    #[error("region {0} ends beyond the address space")]
    Overflow(usize),
    /// Two regions have an address or an offset in common.
    #[error("regions {0} and {1} overlap")]
    Overlap(usize, usize),
}

/// Entry of the JSON array that Firecracker sends.
///
/// `page_size_kib` is the older name of `page_size`; both are in bytes.
#[derive(Debug, Deserialize)]
struct RegionMessage {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

/// Checked regions of one VM. The regions do not overlap, and no sum of their fields overflows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Regions {
    by_address: Vec<Region>,
}

impl Regions {
    /// Checks `regions`.
    ///
    /// # Errors
    /// [`RegionError`]; regions are counted from 0 in the given order.
    pub fn new(regions: &[Region]) -> Result<Self, RegionError> {
        if regions.is_empty() || regions.len() > MAX_REGIONS {
            return Err(RegionError::Count(regions.len()));
        }
        for (index, region) in regions.iter().enumerate() {
            check(index, region)?;
            for (other_index, other) in regions.iter().enumerate().take(index) {
                let same_addresses = overlap(region.address, other.address, region, other);
                if same_addresses || overlap(region.offset, other.offset, region, other) {
                    return Err(RegionError::Overlap(other_index, index));
                }
            }
        }
        let mut by_address = regions.to_vec();
        by_address.sort_unstable_by_key(|region| region.address);
        Ok(Self { by_address })
    }

    /// Decodes and checks the JSON array of Firecracker's handshake.
    ///
    /// # Errors
    /// [`RegionError`]
    pub fn from_json(json: &[u8]) -> Result<Self, RegionError> {
        let messages: Vec<RegionMessage> =
            serde_json::from_slice(json).map_err(RegionError::Json)?;
        let mut regions = Vec::with_capacity(messages.len());
        for (index, message) in messages.iter().enumerate() {
            let page_size = message.page_size.or(message.page_size_kib);
            let bytes = page_size.ok_or(RegionError::NoPageSize(index))?;
            if bytes != PAGE_BYTES {
                return Err(RegionError::PageSize {
                    region: index,
                    bytes,
                });
            }
            regions.push(Region {
                address: message.base_host_virt_addr,
                len: message.size,
                offset: message.offset,
            });
        }
        Self::new(&regions)
    }

    /// Returns all regions, sorted by address.
    #[must_use]
    pub fn as_slice(&self) -> &[Region] {
        &self.by_address
    }

    /// Returns the end of guest memory: the highest end offset of all regions, in bytes.
    #[must_use]
    pub fn end_offset(&self) -> u64 {
        let ends = self
            .by_address
            .iter()
            .map(|region| region.offset + region.len);
        ends.max().unwrap_or(0)
    }

    /// Returns the region that contains an address of the VMM.
    #[must_use]
    pub fn at_address(&self, address: u64) -> Option<&Region> {
        let behind = self
            .by_address
            .partition_point(|region| region.address <= address);
        let region = self.by_address.get(behind.checked_sub(1)?)?;
        (address - region.address < region.len).then_some(region)
    }

    /// Returns the region that contains an offset of guest memory.
    #[must_use]
    pub fn at_offset(&self, offset: u64) -> Option<&Region> {
        self.by_address.iter().find(|region| {
            offset
                .checked_sub(region.offset)
                .is_some_and(|at| at < region.len)
        })
    }

    /// Returns the parts of the addresses `start..end` that belong to guest memory, as (offset,
    /// length).
    pub(crate) fn parts(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
        self.by_address.iter().filter_map(move |region| {
            let first = start.max(region.address);
            let last = end.min(region.address + region.len);
            let len = last.checked_sub(first).filter(|len| *len > 0)?;
            Some((region.offset + (first - region.address), len))
        })
    }
}

fn overlap(first: u64, second: u64, region: &Region, other: &Region) -> bool {
    // No sum overflows, because both regions passed `check`.
    first < second + other.len && second < first + region.len
}

fn check(index: usize, region: &Region) -> Result<(), RegionError> {
    let fields = [
        ("base_host_virt_addr", region.address),
        ("size", region.len),
        ("offset", region.offset),
    ];
    for (field, value) in fields {
        if !value.is_multiple_of(PAGE_BYTES) {
            return Err(RegionError::Unaligned {
                region: index,
                field,
                value,
            });
        }
    }
    if region.len == 0 {
        return Err(RegionError::Empty(index));
    }
    let ends = region
        .address
        .checked_add(region.len)
        .and(region.offset.checked_add(region.len));
    ends.map(|_| ()).ok_or(RegionError::Overflow(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(address: u64, pages: u64, offset: u64) -> Region {
        Region {
            address: address * 4096,
            len: pages * 4096,
            offset: offset * 4096,
        }
    }

    #[test]
    fn addresses_map_to_offsets() {
        let regions = Regions::new(&[region(100, 10, 10), region(10, 10, 0)]).expect("is one");
        assert_eq!(regions.at_address(100 * 4096), Some(&region(100, 10, 10)));
        assert_eq!(regions.at_address(20 * 4096 - 1), Some(&region(10, 10, 0)));
        assert_eq!(regions.at_address(20 * 4096), None);
        assert_eq!(regions.at_address(0), None);
        assert_eq!(regions.at_address(u64::MAX), None);
        assert_eq!(regions.at_offset(19 * 4096), Some(&region(100, 10, 10)));
        assert_eq!(regions.at_offset(20 * 4096), None);
        assert_eq!(regions.end_offset(), 20 * 4096);
        let parts: Vec<_> = regions.parts(15 * 4096, 102 * 4096).collect();
        assert_eq!(parts, [(5 * 4096, 5 * 4096), (10 * 4096, 2 * 4096)]);
    }

    #[test]
    fn invalid_region_is_rejected_with_its_defect() {
        let text = |regions: &[Region]| Regions::new(regions).expect_err("is none").to_string();
        assert!(text(&[]).starts_with("0 regions"));
        assert!(text(&vec![region(1, 1, 1); 65]).starts_with("65 regions"));
        assert_eq!(text(&[region(1, 0, 1)]), "region 0 is empty");
        let mut odd = region(1, 1, 1);
        odd.offset += 1;
        assert_eq!(
            text(&[odd]),
            "`offset` of region 0 is 4097, not a multiple of 4096"
        );
        let far = region(u64::MAX / 4096, 1, 0);
        assert_eq!(text(&[far]), "region 0 ends beyond the address space");
        let far = region(0, 1, u64::MAX / 4096);
        assert_eq!(text(&[far]), "region 0 ends beyond the address space");
        let one = region(1, 4, 0);
        assert_eq!(text(&[one, region(4, 1, 8)]), "regions 0 and 1 overlap");
        assert_eq!(text(&[one, region(9, 1, 3)]), "regions 0 and 1 overlap");
    }

    #[test]
    fn both_names_of_the_page_size_are_bytes() {
        let json = |size: &str| {
            format!(r#"[{{"base_host_virt_addr":4096,"size":8192,"offset":0{size},"more":1}}]"#)
        };
        for size in [
            r#","page_size":4096"#,
            r#","page_size_kib":4096"#,
            r#","page_size":4096,"page_size_kib":4"#,
        ] {
            let regions = Regions::from_json(json(size).as_bytes()).expect("is one");
            assert_eq!(regions.as_slice(), [region(1, 2, 0)]);
        }
        let text = |size: &str| {
            let error = Regions::from_json(json(size).as_bytes()).expect_err("is none");
            error.to_string()
        };
        assert_eq!(text(""), "region 0 has no page size");
        assert_eq!(
            text(r#","page_size_kib":4"#),
            "region 0 has pages of 4 bytes, expected 4096"
        );
        assert!(Regions::from_json(b"[{]").is_err());
        assert!(Regions::from_json(b"{}").is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_description_is_parsed_or_rejected(
            numbers in proptest::collection::vec(proptest::num::u64::ANY, 3..12),
            probe in proptest::num::u64::ANY,
        ) {
            let regions: Vec<Region> = numbers
                .chunks_exact(3)
                .map(|part| Region { address: part[0] & !4095, len: part[1] & !4095, offset: part[2] & !4095 })
                .collect();
            if let Ok(regions) = Regions::new(&regions)
                && let Some(found) = regions.at_address(probe)
            {
                assert!(found.address <= probe && probe - found.address < found.len);
            }
        }

        #[test]
        fn any_bytes_are_parsed_or_rejected(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            if let Ok(regions) = Regions::from_json(&bytes) {
                assert!(!regions.as_slice().is_empty());
            }
        }
    }
}
