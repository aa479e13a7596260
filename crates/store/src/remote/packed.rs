//! Places of chunks in an object, which does not contain chunks of zeros.

use std::ops::Range;

use crate::Content;

/// Begin of each chunk in the object. The last entry is the length of the object.
#[derive(Debug)]
pub(super) struct Packed(Vec<u64>);

impl Packed {
    pub(super) fn of(content: &Content) -> Self {
        let mut at = 0;
        let mut begins = vec![0];
        for chunk in 0..content.chunks() {
            if !content.is_zero(chunk) {
                at += content.chunk_len(chunk) as u64;
            }
            begins.push(at);
        }
        Self(begins)
    }

    /// Returns the length of the object, in bytes.
    pub(super) fn len(&self) -> u64 {
        self.0.last().copied().unwrap_or(0)
    }

    /// Returns the range of a chunk. Empty for zeros.
    pub(super) fn range(&self, chunk: u64) -> Range<u64> {
        let place = |index: u64| {
            let index = usize::try_from(index).unwrap_or(usize::MAX);
            self.0.get(index).copied().unwrap_or_else(|| self.len())
        };
        place(chunk)..place(chunk.saturating_add(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CHUNK_BYTES;

    #[test]
    fn chunks_of_zeros_have_no_place() {
        let mut bytes = vec![0; 3 * 1024 * 1024 + 10];
        bytes[5] = 1;
        bytes[3 * 1024 * 1024] = 1;
        let packed = Packed::of(&Content::of(&bytes).expect("in memory"));
        let ranges = [0, 1, 2, 3].map(|chunk| packed.range(chunk));
        let end = CHUNK_BYTES + 10;
        let expected = [
            0..CHUNK_BYTES,
            CHUNK_BYTES..CHUNK_BYTES,
            CHUNK_BYTES..CHUNK_BYTES,
            CHUNK_BYTES..end,
        ];
        assert_eq!((ranges, packed.len()), (expected, end));
    }
}
