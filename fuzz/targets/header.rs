//! Memory header. An accepted header must serialize to the same bytes and map all of its memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wrenn_snapshot::{
    Header,
    header::{ENTRY_BYTES, FIXED_BYTES, MAGIC, VERSION},
};
use xxhash_rust::xxh3::xxh3_64;

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    if let Some(repaired) = repair(bytes) {
        check(&repaired);
    }
});

fn check(bytes: &[u8]) {
    // The fixed part can also be read alone.
    let summary = Header::summary(bytes);
    let Ok(header) = Header::parse(bytes) else {
        return;
    };
    assert_eq!(header.to_bytes(), bytes);
    let summary = summary.expect("the fixed part of a valid header is valid");
    assert_eq!(summary.memory_size, header.memory_size());
    for mapping in header.mappings() {
        let found = header.lookup(mapping.offset);
        assert_eq!(found, Some((mapping.source, mapping.len)));
        let last = header.lookup(mapping.offset + mapping.len - 1);
        assert_eq!(last.map(|(_, len)| len), Some(1));
    }
    assert_eq!(header.lookup(header.memory_size()), None);
    assert!(header.stored_bytes() <= header.memory_size());
    let (diffs, mappings) = (header.diffs().to_vec(), header.mappings().to_vec());
    assert_eq!(Header::new(summary, diffs, mappings), Ok(header));
}

/// Makes magic, version, lengths, counts and checksum valid: a mutation breaks at least one of
/// them, and the parser would reject it before it reads any entry.
fn repair(bytes: &[u8]) -> Option<Vec<u8>> {
    let entries = bytes.len().checked_sub(FIXED_BYTES)? / ENTRY_BYTES;
    let len = FIXED_BYTES + ENTRY_BYTES * entries;
    let mut bytes = bytes[..len].to_vec();
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &MAGIC);
    put(8, &VERSION.to_le_bytes());
    put(12, &4096_u32.to_le_bytes());
    put(16, &(len as u64).to_le_bytes());
    put(80, &[0; 16]);
    let entries = u32::try_from(entries).ok()?;
    let diffs = u32::from_le_bytes(bytes[72..76].try_into().ok()?).min(entries);
    bytes[72..76].copy_from_slice(&diffs.to_le_bytes());
    bytes[76..80].copy_from_slice(&(entries - diffs).to_le_bytes());
    let checksum = xxh3_64(&bytes);
    bytes[80..88].copy_from_slice(&checksum.to_le_bytes());
    Some(bytes)
}
