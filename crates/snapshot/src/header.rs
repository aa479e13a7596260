//! The memory header: which page of a machine is in which diff file.
//!
//! All numbers are little-endian; offsets and lengths are bytes.
//!
//! | offset | size | field                                                                                  |
//! |-------:|-----:|----------------------------------------------------------------------------------------|
//! |      0 |    8 | magic, `WRENNMEM`                                                                      |
//! |      8 |    4 | version of this format, 1                                                              |
//! |     12 |    4 | block size, 4096                                                                       |
//! |     16 |    8 | length of the whole header                                                             |
//! |     24 |    8 | size of the memory, a multiple of 4096                                                 |
//! |     32 |    8 | generation: 0 was written from a machine without a past                                |
//! |     40 |   16 | build id of this moment                                                                |
//! |     56 |   16 | build id of generation 0                                                               |
//! |     72 |    4 | number of diff files, D                                                                |
//! |     76 |    4 | number of mappings, M                                                                  |
//! |     80 |    8 | XXH3-64 of the whole header, with this field zero                                      |
//! |     88 |    8 | zero                                                                                   |
//! |     96 | 32·D | diff files: build id (16), length (8), XXH3-64 of the content (8)                      |
//! |      … | 32·M | mappings: offset (8), length (8), number of the diff file or `0xFFFF_FFFF` for zeros (4), zero (4), offset in the diff file (8) |
//!
//! Mappings are sorted and cover the whole memory exactly once. The fixed part can be read alone ([`Header::summary`]).

mod parse;

use std::fmt;

use xxhash_rust::xxh3::Xxh3;

use crate::{BuildId, Mapping, PAGE_BYTES, Source, mapping::lookup};

/// First bytes of a header.
pub const MAGIC: [u8; 8] = *b"WRENNMEM";
/// Version of the format.
pub const VERSION: u32 = 1;
/// Length of the fixed part, bytes.
pub const FIXED_BYTES: usize = 96;
/// Length of a diff file's or a mapping's entry, bytes.
pub const ENTRY_BYTES: usize = 32;
/// Where the checksum is.
const CHECKSUM_AT: usize = 80;
/// The number that stands for zeros.
const ZERO_FILE: u32 = u32::MAX;
/// The most mappings that are read; one a page of 1 TiB. A damaged number must not ask for all memory.
const MAX_MAPPINGS: u32 = 1 << 28;
/// The most diff files that are read.
const MAX_DIFFS: u32 = 1 << 12;

/// A file that pages are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiffFile {
    /// Its name.
    pub build: BuildId,
    /// Its length, bytes.
    pub len: u64,
    /// XXH3-64 of its content.
    pub checksum: u64,
}

/// The fixed part of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Size of the memory, bytes.
    pub memory_size: u64,
    /// Generation; 0 is the first.
    pub generation: u64,
    /// This moment.
    pub build: BuildId,
    /// Generation 0.
    pub base: BuildId,
}

/// A header, whose parts are known to fit together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    summary: Summary,
    diffs: Vec<DiffFile>,
    mappings: Vec<Mapping>,
}

/// Why bytes are not a header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// It ends too early, or goes on behind its end.
    #[error("it has {got} bytes instead of {want}")]
    Length {
        /// What it has.
        got: usize,
        /// What it should have, as far as is known.
        want: u64,
    },
    /// A field of the fixed part is wrong.
    #[error("the {field} at byte {offset} is {value}")]
    Field {
        /// Its name.
        field: &'static str,
        /// Where it is.
        offset: usize,
        /// What it says.
        value: String,
    },
    /// It is not what was written.
    #[error("the checksum at byte {CHECKSUM_AT} does not fit: it was changed or only half written")]
    Checksum,
    /// An entry of a table is wrong.
    #[error("entry {index} of the {table} (byte {offset}): {problem}")]
    Entry {
        /// `diff files` or `mappings`.
        table: &'static str,
        /// Number of the entry, from 0.
        index: usize,
        /// Where it is.
        offset: usize,
        /// What is wrong.
        problem: Problem,
    },
    /// The mappings end before the memory does.
    #[error("the mappings end at {end} of {size} bytes of memory")]
    Incomplete {
        /// Where they end.
        end: u64,
        /// Size of the memory.
        size: u64,
    },
}

/// What is wrong with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// Not of whole pages.
    Misaligned,
    /// No length.
    Empty,
    /// Does not begin where the one before ends.
    GapOrOverlap,
    /// Reaches behind the memory's end.
    OutsideMemory,
    /// There is no diff file of this number.
    NoSuchFile,
    /// Reaches behind the diff file's end.
    OutsideFile,
    /// A field that must be zero is not.
    NotZero,
    /// The same file twice.
    Twice,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Misaligned => "it is not of whole pages",
            Self::Empty => "it is empty",
            Self::GapOrOverlap => "it does not begin where the one before ends",
            Self::OutsideMemory => "it reaches behind the end of memory",
            Self::NoSuchFile => "there is no diff file of this number",
            Self::OutsideFile => "it reaches behind the end of its diff file",
            Self::NotZero => "a field that must be zero is not",
            Self::Twice => "the file is there already",
        })
    }
}

impl Header {
    /// A header of parts that must fit together.
    ///
    /// # Errors
    /// Says which do not.
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

    /// Reads a header.
    ///
    /// # Errors
    /// Says what is wrong, and where.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        parse::header(bytes)
    }

    /// Reads the fixed part alone, without a look at the rest.
    ///
    /// # Errors
    /// Says what is wrong, and where.
    pub fn summary(bytes: &[u8]) -> Result<Summary, HeaderError> {
        parse::summary(bytes)
    }

    /// The bytes of the file.
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

    /// Size of the memory, bytes.
    #[must_use]
    pub const fn memory_size(&self) -> u64 {
        self.summary.memory_size
    }

    /// Generation; 0 is the first.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.summary.generation
    }

    /// This moment.
    #[must_use]
    pub const fn build(&self) -> BuildId {
        self.summary.build
    }

    /// Generation 0.
    #[must_use]
    pub const fn base(&self) -> BuildId {
        self.summary.base
    }

    /// The files that pages are in.
    #[must_use]
    pub fn diffs(&self) -> &[DiffFile] {
        &self.diffs
    }

    /// Which page is where.
    #[must_use]
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// What is at `offset`, and how many bytes from there are of the same piece. `None` behind the end of memory.
    #[must_use]
    pub fn lookup(&self, offset: u64) -> Option<(Source, u64)> {
        lookup(&self.mappings, offset)
    }

    /// Memory that is not zeros, bytes.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let stored = self.mappings.iter().filter(|m| m.source != Source::Zero);
        stored.map(|mapping| mapping.len).sum()
    }
}

/// A number of entries; there are never as many as do not fit.
fn count(entries: usize) -> u32 {
    u32::try_from(entries).unwrap_or(u32::MAX)
}

/// Of a header, as if its checksum were zero.
fn checksum(bytes: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&bytes[..CHECKSUM_AT]);
    hash.update(&[0; 8]);
    hash.update(&bytes[CHECKSUM_AT + 8..]);
    hash.digest()
}

#[cfg(test)]
mod tests;
