//! Memory header: maps every page of a VM to a diff file.
//!
//! All numbers are little-endian; offsets and lengths are in bytes.
//!
//! | offset | size | field                                                             |
//! |-------:|-----:|-------------------------------------------------------------------|
//! |      0 |    8 | magic, `WRENNMEM`                                                 |
//! |      8 |    4 | version of this format, 1                                         |
//! |     12 |    4 | block size, 4096                                                  |
//! |     16 |    8 | length of the whole header                                        |
//! |     24 |    8 | size of the memory, a multiple of 4096                            |
//! |     32 |    8 | generation; 0 has no parent snapshot                              |
//! |     40 |   16 | id of this snapshot                                               |
//! |     56 |   16 | snapshot id of generation 0                                       |
//! |     72 |    4 | number of diff files, D                                           |
//! |     76 |    4 | number of mappings, M                                             |
//! |     80 |    8 | XXH3-64 of the whole header, with this field zero                 |
//! |     88 |    8 | zero                                                              |
//! |     96 | 32·D | diff files: snapshot id (16), length (8), XXH3-64 of content (8)  |
//! |      … | 32·M | mappings, see below                                               |
//!
//! Mapping, 32 bytes:
//!
//! | offset | size | field                                                             |
//! |-------:|-----:|-------------------------------------------------------------------|
//! |      0 |    8 | offset in memory                                                  |
//! |      8 |    8 | length                                                            |
//! |     16 |    4 | index of the diff file, or `0xFFFF_FFFF` for zeros                |
//! |     20 |    4 | zero                                                              |
//! |     24 |    8 | offset in the diff file                                           |
//!
//! Mappings are sorted and cover the whole memory exactly once. The fixed part can be read alone
//! ([`Header::summary`]).

mod parse;

use std::fmt;

use xxhash_rust::xxh3::Xxh3;

use crate::{Mapping, PAGE_BYTES, SnapshotId, Source, mapping::lookup};

/// First bytes of a header.
pub const MAGIC: [u8; 8] = *b"WRENNMEM";
/// Version of the format.
pub const VERSION: u32 = 1;
/// Length of the fixed part, in bytes.
pub const FIXED_BYTES: usize = 96;
/// Length of the entry of a diff file or a mapping, in bytes.
pub const ENTRY_BYTES: usize = 32;
/// Offset of the checksum, in bytes.
const CHECKSUM_AT: usize = 80;
/// File index that denotes zeros.
const ZERO_FILE: u32 = u32::MAX;
/// Maximum number of mappings that are read: one per page of 1 TiB. The limit prevents a damaged
/// count from requesting all memory.
const MAX_MAPPINGS: u32 = 1 << 28;
/// Maximum number of diff files that are read.
const MAX_DIFFS: u32 = 1 << 12;

/// Diff file that contains pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiffFile {
    /// Snapshot id that names the file.
    pub build: SnapshotId,
    /// Length of the file, in bytes.
    pub len: u64,
    /// XXH3-64 of the file's content.
    pub checksum: u64,
}

/// Fixed part of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Size of the memory, in bytes.
    pub memory_size: u64,
    /// Generation; 0 is the first.
    pub generation: u64,
    /// Id of this snapshot.
    pub build: SnapshotId,
    /// Snapshot id of generation 0.
    pub base: SnapshotId,
}

/// Memory header whose parts are known to be consistent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    summary: Summary,
    diffs: Vec<DiffFile>,
    mappings: Vec<Mapping>,
}

/// Reason why bytes are not a valid header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The header is too short, or has trailing bytes.
    #[error("header is {got} bytes, expected {want}")]
    Length {
        /// Actual length, in bytes.
        got: usize,
        /// Expected length, in bytes, as far as it is known.
        want: u64,
    },
    /// A field of the fixed part is invalid.
    #[error("invalid {field} at byte {offset}: {value}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Offset of the field, in bytes.
        offset: usize,
        /// Value of the field.
        value: String,
    },
    /// The header differs from the written header.
    #[error("checksum mismatch at byte {CHECKSUM_AT}: header changed or partly written")]
    Checksum,
    /// An entry of a table is invalid.
    #[error("invalid entry {index} of the {table} at byte {offset}: {problem}")]
    Entry {
        /// `diff files` or `mappings`.
        table: &'static str,
        /// Index of the entry, from 0.
        index: usize,
        /// Offset of the entry, in bytes.
        offset: usize,
        /// Defect of the entry.
        problem: Problem,
    },
    /// The mappings end before the memory does.
    #[error("mappings end at byte {end}, expected {size} bytes of memory")]
    Incomplete {
        /// End of the last mapping, in bytes.
        end: u64,
        /// Size of the memory, in bytes.
        size: u64,
    },
}

/// Defect of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// Offset or length is not a multiple of the page size.
    Misaligned,
    /// The length is 0.
    Empty,
    /// The mapping does not begin where the previous one ends.
    GapOrOverlap,
    /// The mapping extends beyond the end of memory.
    OutsideMemory,
    /// No diff file has this index.
    NoSuchFile,
    /// The mapping extends beyond the end of its diff file.
    OutsideFile,
    /// A reserved field is not zero.
    NotZero,
    /// The same diff file is listed twice.
    Twice,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Misaligned => "offset or length is not a multiple of the page size",
            Self::Empty => "length is 0",
            Self::GapOrOverlap => "does not begin where the previous entry ends",
            Self::OutsideMemory => "extends beyond the end of memory",
            Self::NoSuchFile => "no diff file has this index",
            Self::OutsideFile => "extends beyond the end of its diff file",
            Self::NotZero => "reserved field is not zero",
            Self::Twice => "duplicate diff file",
        })
    }
}

impl Header {
    /// Creates a header from its parts and checks that they are consistent.
    ///
    /// # Errors
    /// The error names the inconsistent part.
    pub fn new(
        summary: Summary,
        diffs: Vec<DiffFile>,
        mappings: Vec<Mapping>,
    ) -> Result<Self, HeaderError> {
        let header = Self {
            summary,
            diffs,
            mappings,
        };
        parse::validate(&header)?;
        Ok(header)
    }

    /// Parses a header.
    ///
    /// # Errors
    /// The error names the defect and its position.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        parse::header(bytes)
    }

    /// Parses the fixed part only, without reading the rest.
    ///
    /// # Errors
    /// The error names the defect and its position.
    pub fn summary(bytes: &[u8]) -> Result<Summary, HeaderError> {
        parse::summary(bytes)
    }

    /// Encodes the header as the content of its file.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let entries = self.diffs.len() + self.mappings.len();
        let len = FIXED_BYTES + ENTRY_BYTES * entries;
        let mut bytes = Vec::with_capacity(len);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(u32::try_from(PAGE_BYTES).unwrap_or(0).to_le_bytes());
        bytes.extend((len as u64).to_le_bytes());
        bytes.extend(self.summary.memory_size.to_le_bytes());
        bytes.extend(self.summary.generation.to_le_bytes());
        bytes.extend(self.summary.build.0);
        bytes.extend(self.summary.base.0);
        bytes.extend(count(self.diffs.len()).to_le_bytes());
        bytes.extend(count(self.mappings.len()).to_le_bytes());
        bytes.extend([0; 16]);
        for diff in &self.diffs {
            bytes.extend(diff.build.0);
            bytes.extend(diff.len.to_le_bytes());
            bytes.extend(diff.checksum.to_le_bytes());
        }
        for mapping in &self.mappings {
            let (file, offset) = match mapping.source {
                Source::Zero => (ZERO_FILE, 0),
                Source::Diff { file, offset } => (file, offset),
            };
            bytes.extend(mapping.offset.to_le_bytes());
            bytes.extend(mapping.len.to_le_bytes());
            bytes.extend(file.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(offset.to_le_bytes());
        }
        let checksum = checksum(&bytes).to_le_bytes();
        bytes[CHECKSUM_AT..CHECKSUM_AT + 8].copy_from_slice(&checksum);
        bytes
    }

    /// Returns the size of the memory, in bytes.
    #[must_use]
    pub const fn memory_size(&self) -> u64 {
        self.summary.memory_size
    }

    /// Returns the generation; 0 is the first.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.summary.generation
    }

    /// Returns the id of this snapshot.
    #[must_use]
    pub const fn build(&self) -> SnapshotId {
        self.summary.build
    }

    /// Returns the snapshot id of generation 0.
    #[must_use]
    pub const fn base(&self) -> SnapshotId {
        self.summary.base
    }

    /// Returns the diff files that contain pages.
    #[must_use]
    pub fn diffs(&self) -> &[DiffFile] {
        &self.diffs
    }

    /// Returns the mappings of all pages.
    #[must_use]
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Returns the source of the content at `offset` and the number of bytes from there in the same
    /// mapping. Returns `None` beyond the end of memory.
    #[must_use]
    pub fn lookup(&self, offset: u64) -> Option<(Source, u64)> {
        lookup(&self.mappings, offset)
    }

    /// Returns, for each diff file, the number of its bytes that are part of the memory.
    #[must_use]
    pub fn used_bytes(&self) -> Vec<u64> {
        let mut used = vec![0; self.diffs.len()];
        for mapping in &self.mappings {
            if let Source::Diff { file, .. } = mapping.source
                && let Some(used) = used.get_mut(file as usize)
            {
                *used += mapping.len;
            }
        }
        used
    }

    /// Returns the number of bytes of memory that are stored in diff files, that is, not zeros.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let stored = self.mappings.iter().filter(|m| m.source != Source::Zero);
        stored.map(|mapping| mapping.len).sum()
    }
}

/// Converts a number of entries. Valid headers never exceed the range of `u32`.
fn count(entries: usize) -> u32 {
    u32::try_from(entries).unwrap_or(u32::MAX)
}

/// Returns the checksum of a header, computed as if its checksum field were zero.
fn checksum(bytes: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&bytes[..CHECKSUM_AT]);
    hash.update(&[0; 8]);
    hash.update(&bytes[CHECKSUM_AT + 8..]);
    hash.digest()
}

#[cfg(test)]
mod tests;
