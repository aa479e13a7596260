//! Working set: the pages that a restored VM needed first, prefetched at the next restore.
//!
//! Format, little-endian: magic `WRENNWS1` (8 bytes), number of runs (8), XXH3-64 of the runs (8),
//! then per run its offset in memory and its length, in bytes (8 each). A damaged working set is
//! not used; only performance depends on it.

use xxhash_rust::xxh3::xxh3_64;

use crate::mapping::is_aligned;

const MAGIC: [u8; 8] = *b"WRENNWS1";
const FIXED_BYTES: usize = 24;
const RUN_BYTES: usize = 16;

/// Runs of pages, in the order in which they are loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkingSet(Vec<(u64, u64)>);

/// Reason why bytes are not a valid working set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WorkingSetError {
    /// The magic or the length is invalid.
    #[error("not a working set: invalid magic or length")]
    NotOne,
    /// The content differs from the written content.
    #[error("checksum mismatch in the working set")]
    Checksum,
    /// A run does not consist of whole pages, or lies outside of any memory.
    #[error("run {0} of the working set is unaligned or out of range")]
    Run(usize),
}

impl WorkingSet {
    /// Creates a working set from runs of offset and length, in bytes.
    pub fn from_runs(runs: impl IntoIterator<Item = (u64, u64)>) -> Self {
        Self(runs.into_iter().collect())
    }

    /// Returns offset and length of each run, in bytes.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().copied()
    }

    /// Parses a working set.
    ///
    /// # Errors
    /// Fails if the bytes are not a working set, or are damaged.
    pub fn parse(bytes: &[u8]) -> Result<Self, WorkingSetError> {
        let Some((fixed, runs)) = bytes.split_at_checked(FIXED_BYTES) else {
            return Err(WorkingSetError::NotOne);
        };
        let number = |at: usize| word(&fixed[at..]);
        let count = (runs.len() / RUN_BYTES) as u64;
        if fixed[..8] != MAGIC || !runs.len().is_multiple_of(RUN_BYTES) || number(8) != count {
            return Err(WorkingSetError::NotOne);
        }
        if number(16) != xxh3_64(runs) {
            return Err(WorkingSetError::Checksum);
        }
        let runs = runs.chunks_exact(RUN_BYTES).enumerate();
        let run = |(index, bytes): (usize, &[u8])| {
            let (offset, len) = (word(bytes), word(&bytes[8..]));
            let possible = is_aligned(offset)
                && is_aligned(len)
                && len != 0
                && offset.checked_add(len).is_some();
            possible
                .then_some((offset, len))
                .ok_or(WorkingSetError::Run(index))
        };
        Ok(Self(runs.map(run).collect::<Result<_, _>>()?))
    }

    /// Encodes the working set as the content of its file.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut runs = Vec::with_capacity(RUN_BYTES * self.0.len());
        for (offset, len) in &self.0 {
            runs.extend(offset.to_le_bytes());
            runs.extend(len.to_le_bytes());
        }
        let mut bytes = MAGIC.to_vec();
        bytes.extend((self.0.len() as u64).to_le_bytes());
        bytes.extend(xxh3_64(&runs).to_le_bytes());
        bytes.extend(runs);
        bytes
    }
}

fn word(bytes: &[u8]) -> u64 {
    let mut array = [0; 8];
    array.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(array)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn working_set_round_trips_and_damage_is_detected() {
        let set = WorkingSet::from_runs([(4096, 8192), (0, 4096)]);
        let bytes = set.to_bytes();
        assert_eq!(WorkingSet::parse(&bytes), Ok(set));
        for end in 0..bytes.len() {
            assert!(WorkingSet::parse(&bytes[..end]).is_err(), "{end} bytes");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            assert!(WorkingSet::parse(&damaged).is_err(), "byte {at}");
        }
        let odd = WorkingSet::from_runs([(1, 4096)]).to_bytes();
        assert_eq!(WorkingSet::parse(&odd), Err(WorkingSetError::Run(0)));
    }
}
