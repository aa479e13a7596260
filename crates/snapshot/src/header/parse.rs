//! Parser of untrusted header bytes.

use super::{
    CHECKSUM_AT, DiffFile, ENTRY_BYTES, FIXED_BYTES, Header, HeaderError, MAGIC, MAX_DIFFS,
    MAX_MAPPINGS, Problem, Summary, VERSION, ZERO_FILE, checksum,
};
use crate::{Mapping, PAGE_BYTES, SnapshotId, Source, mapping::is_aligned};

pub(super) fn header(bytes: &[u8]) -> Result<Header, HeaderError> {
    let summary = summary(bytes)?;
    let (diffs, mappings) = (u32_at(bytes, 72), u32_at(bytes, 76));
    let entries = u64::from(diffs) + u64::from(mappings);
    let want = FIXED_BYTES as u64 + ENTRY_BYTES as u64 * entries;
    if bytes.len() as u64 != want || u64_at(bytes, 16) != want {
        return Err(HeaderError::Length {
            got: bytes.len(),
            want,
        });
    }
    if checksum(bytes) != u64_at(bytes, CHECKSUM_AT) {
        return Err(HeaderError::Checksum);
    }
    let (files, ranges) = bytes[FIXED_BYTES..].split_at(ENTRY_BYTES * diffs as usize);
    let header = Header {
        summary,
        diffs: files.chunks_exact(ENTRY_BYTES).map(diff).collect(),
        mappings: ranges
            .chunks_exact(ENTRY_BYTES)
            .enumerate()
            .map(|(index, entry)| mapping(entry, index, diffs as usize))
            .collect::<Result<_, _>>()?,
    };
    validate(&header)?;
    Ok(header)
}

pub(super) fn summary(bytes: &[u8]) -> Result<Summary, HeaderError> {
    if bytes.len() < FIXED_BYTES {
        return Err(HeaderError::Length {
            got: bytes.len(),
            want: FIXED_BYTES as u64,
        });
    }
    let wrong = |field, offset, value: String| HeaderError::Field {
        field,
        offset,
        value,
    };
    if bytes[..8] != MAGIC {
        return Err(wrong("magic", 0, hex::encode(&bytes[..8])));
    }
    let must_be = [("version", 8, VERSION), ("block size", 12, 4096)];
    for (field, offset, want) in must_be {
        let got = u32_at(bytes, offset);
        if got != want {
            return Err(wrong(field, offset, format!("{got}, expected {want}")));
        }
    }
    let memory_size = u64_at(bytes, 24);
    if memory_size == 0 || !is_aligned(memory_size) {
        return Err(wrong("memory size", 24, memory_size.to_string()));
    }
    for (field, offset, most) in [
        ("diff file count", 72, MAX_DIFFS),
        ("mapping count", 76, MAX_MAPPINGS),
    ] {
        let got = u32_at(bytes, offset);
        if got > most {
            return Err(wrong(field, offset, format!("{got}, maximum {most}")));
        }
    }
    if u64_at(bytes, 88) != 0 {
        return Err(wrong("reserved field", 88, "not zero".to_owned()));
    }
    Ok(Summary {
        memory_size,
        generation: u64_at(bytes, 32),
        build: build_at(bytes, 40),
        base: build_at(bytes, 56),
    })
}

fn diff(entry: &[u8]) -> DiffFile {
    DiffFile {
        build: build_at(entry, 0),
        len: u64_at(entry, 16),
        checksum: u64_at(entry, 24),
    }
}

fn mapping(entry: &[u8], index: usize, diffs: usize) -> Result<Mapping, HeaderError> {
    let (file, offset) = (u32_at(entry, 16), u64_at(entry, 24));
    let zero = file == ZERO_FILE;
    if u32_at(entry, 20) != 0 || (zero && offset != 0) {
        return Err(HeaderError::Entry {
            table: "mappings",
            index,
            offset: FIXED_BYTES + ENTRY_BYTES * (diffs + index),
            problem: Problem::NotZero,
        });
    }
    Ok(Mapping {
        offset: u64_at(entry, 0),
        len: u64_at(entry, 8),
        source: if zero {
            Source::Zero
        } else {
            Source::Diff { file, offset }
        },
    })
}

/// Checks that the parts of the header are consistent.
pub(super) fn validate(header: &Header) -> Result<(), HeaderError> {
    let size = header.summary.memory_size;
    if size == 0 || !is_aligned(size) {
        return Err(HeaderError::Field {
            field: "memory size",
            offset: 24,
            value: size.to_string(),
        });
    }
    for (index, diff) in header.diffs.iter().enumerate() {
        let problem = if !is_aligned(diff.len) {
            Problem::Misaligned
        } else if header.diffs[..index].iter().any(|d| d.build == diff.build) {
            Problem::Twice
        } else {
            continue;
        };
        return Err(HeaderError::Entry {
            table: "diff files",
            index,
            offset: FIXED_BYTES + ENTRY_BYTES * index,
            problem,
        });
    }
    let mut end = 0;
    for (index, mapping) in header.mappings.iter().enumerate() {
        if let Some(problem) = problem_of(mapping, end, header) {
            return Err(HeaderError::Entry {
                table: "mappings",
                index,
                offset: FIXED_BYTES + ENTRY_BYTES * (header.diffs.len() + index),
                problem,
            });
        }
        end = mapping.end();
    }
    if end == size {
        Ok(())
    } else {
        Err(HeaderError::Incomplete { end, size })
    }
}

fn problem_of(mapping: &Mapping, expected: u64, header: &Header) -> Option<Problem> {
    if !is_aligned(mapping.offset) || !is_aligned(mapping.len) {
        return Some(Problem::Misaligned);
    }
    if mapping.len == 0 {
        return Some(Problem::Empty);
    }
    if mapping.offset != expected {
        return Some(Problem::GapOrOverlap);
    }
    let inside = |end: Option<u64>, limit: u64| end.is_some_and(|end| end <= limit);
    if !inside(
        mapping.offset.checked_add(mapping.len),
        header.summary.memory_size,
    ) {
        return Some(Problem::OutsideMemory);
    }
    let Source::Diff { file, offset } = mapping.source else {
        return None;
    };
    let Some(diff) = header.diffs.get(file as usize) else {
        return Some(Problem::NoSuchFile);
    };
    if !offset.is_multiple_of(PAGE_BYTES) {
        return Some(Problem::Misaligned);
    }
    (!inside(offset.checked_add(mapping.len), diff.len)).then_some(Problem::OutsideFile)
}

/// Returns `N` bytes at offset `at`. Callers have checked that the bytes exist.
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

fn build_at(bytes: &[u8], at: usize) -> SnapshotId {
    SnapshotId(array_at(bytes, at))
}
