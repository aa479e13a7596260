//! Length of an artifact's content, and a checksum of each chunk.
//!
//! As JSON, `len` is the length in bytes, and `xxh3_64` describes the chunks of 1 MiB in their order:
//! a number is a number of chunks whose bytes are all zero, a string the XXH3-64 of consecutive
//! chunks, 16 hexadecimal digits each. The last chunk may be shorter. A chunk can be verified without
//! the others, so a range can be trusted.

use std::io;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::ReadAt;

/// Size of a chunk, in bytes.
pub const CHUNK_BYTES: u64 = 1024 * 1024;

/// Size of a chunk, as a length of slices.
const CHUNK: usize = 1024 * 1024;

/// Maximum number of chunks: 16 TiB. The limit prevents a damaged length from requesting all memory.
const MAX_CHUNKS: u64 = 1 << 24;

/// Number of characters of a checksum.
const TEXT_BYTES: usize = 16;

/// Length and checksums of content.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(into = "Text", try_from = "Text")]
pub struct Content {
    len: u64,
    /// XXH3-64 of each chunk; `None` for zeros.
    sums: Vec<Option<u64>>,
}

/// Form in JSON.
#[derive(Serialize, Deserialize)]
struct Text {
    len: u64,
    xxh3_64: Vec<Run>,
}

/// Consecutive chunks.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Run {
    /// Number of chunks of zeros.
    Zeros(u64),
    /// Checksums.
    Sums(String),
}

/// Reason why text is not a list of checksums.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseContentError {
    /// The content is too long.
    #[error("content of {0} bytes is longer than {limit} chunks", limit = MAX_CHUNKS)]
    Length(u64),
    /// The number of checksums does not match the length.
    #[error("checksums of {got} chunks, expected {want}")]
    Count {
        /// Number of chunks with a checksum.
        got: u64,
        /// Number of chunks.
        want: u64,
    },
    /// A checksum has another form.
    #[error("checksum of chunk {0} is not 16 lowercase hexadecimal digits")]
    Digits(u64),
}

impl Content {
    /// Reads content and returns its length and checksums. Ranges without data are not read.
    ///
    /// # Errors
    /// The content cannot be read.
    pub fn of(source: &dyn ReadAt) -> io::Result<Self> {
        let len = source.len()?;
        let mut sums = vec![None; usize::try_from(chunks(len)).unwrap_or(usize::MAX)];
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        while let Some((begin, end)) = source.next_data(at)? {
            let first = begin / CHUNK_BYTES;
            for index in first..chunks(end.min(len)) {
                let part = &mut buffer[..chunk_len(len, index)];
                source.read_at(index * CHUNK_BYTES, part)?;
                sums[usize::try_from(index).unwrap_or(usize::MAX)] = sum(part);
            }
            at = chunks(end) * CHUNK_BYTES;
        }
        Ok(Self { len, sums })
    }

    /// Returns the length, in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// True if there is no content.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the number of chunks.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.sums.len() as u64
    }

    /// Returns the length of a chunk, in bytes. The chunk must exist.
    #[must_use]
    pub fn chunk_len(&self, index: u64) -> usize {
        chunk_len(self.len, index)
    }

    /// True if all bytes of a chunk are zero.
    #[must_use]
    pub fn is_zero(&self, index: u64) -> bool {
        matches!(self.sum(index), Some(None))
    }

    /// True if `bytes` are the content of a chunk.
    #[must_use]
    pub fn matches(&self, index: u64, bytes: &[u8]) -> bool {
        self.sum(index) == Some(sum(bytes))
            && index < self.chunks()
            && bytes.len() == self.chunk_len(index)
    }

    /// Returns a key for an artifact that is named by its content: the XXH3-128, in 32 hexadecimal
    /// digits, of the length and, for each chunk, of 1 and its checksum, or of 0 twice for zeros.
    /// Little-endian, 8 bytes each.
    #[must_use]
    pub fn key(&self) -> String {
        let mut hash = Xxh3::new();
        hash.update(&self.len.to_le_bytes());
        for sum in &self.sums {
            hash.update(&u64::from(sum.is_some()).to_le_bytes());
            hash.update(&sum.unwrap_or_default().to_le_bytes());
        }
        format!("{:032x}", hash.digest128())
    }

    fn sum(&self, index: u64) -> Option<Option<u64>> {
        self.sums.get(usize::try_from(index).ok()?).copied()
    }
}

fn chunks(len: u64) -> u64 {
    len.div_ceil(CHUNK_BYTES)
}

fn chunk_len(len: u64, index: u64) -> usize {
    let left = len.saturating_sub(index * CHUNK_BYTES);
    usize::try_from(left.min(CHUNK_BYTES)).unwrap_or(usize::MAX)
}

fn sum(bytes: &[u8]) -> Option<u64> {
    let is_zero = bytes
        .chunks(16)
        .all(|word| word.iter().all(|byte| *byte == 0));
    (!is_zero).then(|| xxh3_64(bytes))
}

/// Computes length and checksums of content that is written from its begin to its end.
#[derive(Debug, Default)]
pub struct ContentHasher {
    content: Content,
    part: Vec<u8>,
}

impl ContentHasher {
    /// Adds the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = CHUNK - self.part.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.part.extend_from_slice(now);
            self.content.len += now.len() as u64;
            if self.part.len() == CHUNK {
                self.close();
            }
            bytes = later;
        }
    }

    /// Returns length and checksums of all bytes.
    #[must_use]
    pub fn finish(mut self) -> Content {
        if !self.part.is_empty() {
            self.close();
        }
        self.content
    }

    fn close(&mut self) {
        self.content.sums.push(sum(&self.part));
        self.part.clear();
    }
}

impl From<Content> for Text {
    fn from(content: Content) -> Self {
        let mut runs = Vec::new();
        for sum in content.sums {
            match (sum, runs.last_mut()) {
                (None, Some(Run::Zeros(count))) => *count += 1,
                (None, _) => runs.push(Run::Zeros(1)),
                (Some(sum), Some(Run::Sums(text))) => text.push_str(&format!("{sum:016x}")),
                (Some(sum), _) => runs.push(Run::Sums(format!("{sum:016x}"))),
            }
        }
        Self {
            len: content.len,
            xxh3_64: runs,
        }
    }
}

impl TryFrom<Text> for Content {
    type Error = ParseContentError;

    fn try_from(text: Text) -> Result<Self, ParseContentError> {
        let want = chunks(text.len);
        if want > MAX_CHUNKS {
            return Err(ParseContentError::Length(text.len));
        }
        let mut sums = Vec::new();
        for run in text.xxh3_64 {
            let before = sums.len() as u64;
            match run {
                Run::Zeros(count) => {
                    let got = before.saturating_add(count);
                    if got > want {
                        return Err(ParseContentError::Count { got, want });
                    }
                    sums.resize(usize::try_from(got).unwrap_or(usize::MAX), None);
                }
                Run::Sums(text) => parse_sums(&text, &mut sums)?,
            }
        }
        match sums.len() as u64 {
            got if got == want => Ok(Self {
                len: text.len,
                sums,
            }),
            got => Err(ParseContentError::Count { got, want }),
        }
    }
}

fn parse_sums(text: &str, sums: &mut Vec<Option<u64>>) -> Result<(), ParseContentError> {
    for digits in text.as_bytes().chunks(TEXT_BYTES) {
        let invalid = || ParseContentError::Digits(sums.len() as u64);
        let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if digits.len() != TEXT_BYTES || !digits.iter().all(is_digit) {
            return Err(invalid());
        }
        let digits = std::str::from_utf8(digits).map_err(|_| invalid())?;
        let sum = u64::from_str_radix(digits, 16).map_err(|_| invalid())?;
        sums.push(Some(sum));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(len: usize) -> Vec<u8> {
        (0..len)
            .map(|i| u8::try_from(i % 251).unwrap() + 1)
            .collect()
    }

    #[test]
    fn each_chunk_is_verified_alone_and_zeros_have_their_own_mark() {
        let mib = CHUNK;
        let mut all = bytes(3 * mib + 5);
        all[mib..2 * mib].fill(0);
        let content = Content::of(&all).unwrap();
        assert_eq!((content.len(), content.chunks()), (all.len() as u64, 4));
        for index in 0..4 {
            let begin = index * mib;
            let chunk = &all[begin..all.len().min(begin + mib)];
            assert!(content.matches(index as u64, chunk));
            let mut damaged = chunk.to_vec();
            damaged[3] ^= 1;
            assert!(!content.matches(index as u64, &damaged));
            assert!(!content.matches(index as u64, &chunk[..chunk.len() - 1]));
        }
        assert!(content.is_zero(1) && !content.is_zero(0) && !content.is_zero(4));
        assert!(!content.matches(4, &[]));
    }

    #[test]
    fn checksums_have_a_fixed_form() {
        let mib = CHUNK;
        let mut all = vec![0; 5 * mib + 1];
        all[..2 * mib].copy_from_slice(&bytes(2 * mib));
        let content = Content::of(&all).unwrap();
        let sums = [0, 1].map(|index| format!("{:016x}", xxh3_64(&all[index * mib..][..mib])));
        let text = serde_json::to_string(&content).unwrap();
        assert_eq!(
            text,
            format!(r#"{{"len":5242881,"xxh3_64":["{}",4]}}"#, sums.concat())
        );
        assert_eq!(serde_json::from_str::<Content>(&text).unwrap(), content);
        let empty = serde_json::to_string(&Content::default()).unwrap();
        assert_eq!(empty, r#"{"len":0,"xxh3_64":[]}"#);
        for wrong in [
            r#"{"len":7,"xxh3_64":[]}"#,
            r#"{"len":7,"xxh3_64":[2]}"#,
            r#"{"len":0,"xxh3_64":[1]}"#,
            r#"{"len":7,"xxh3_64":[-1]}"#,
            r#"{"len":7,"xxh3_64":[18446744073709551615,2]}"#,
            r#"{"len":7,"xxh3_64":["60415D5F616602AA"]}"#,
            r#"{"len":7,"xxh3_64":["+0415d5f616602aa"]}"#,
            r#"{"len":7,"xxh3_64":["60415d5f616602a"]}"#,
            r#"{"len":18446744073709551615,"xxh3_64":[17592186044416]}"#,
        ] {
            assert!(serde_json::from_str::<Content>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn key_depends_on_all_of_the_content() {
        let contents = [vec![], vec![0], vec![0, 0], vec![1], vec![0; CHUNK + 1]];
        let keys = contents.map(|bytes| Content::of(&bytes).unwrap().key());
        let different: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(different.len(), keys.len(), "{keys:?}");
        assert!(keys.iter().all(|key| key.len() == 32));
    }

    #[test]
    fn holes_of_a_file_are_not_read() {
        use std::os::unix::fs::FileExt as _;
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 30).unwrap();
        file.write_all_at(&[7; 100], (40 << 30) + 5).unwrap();
        let content = Content::of(&file).unwrap();
        assert_eq!(content.chunks(), 64 << 10);
        let data: Vec<u64> = (0..content.chunks())
            .filter(|i| !content.is_zero(*i))
            .collect();
        assert_eq!(data, [40 << 10]);
    }

    proptest! {
        #[test]
        fn a_written_file_has_the_checksums_of_its_content(
            len in 0_usize..(3 << 20), pieces in prop::collection::vec(1_usize..(1 << 20), 1..8)
        ) {
            let all = bytes(len);
            let mut hasher = ContentHasher::default();
            let mut rest = all.as_slice();
            for piece in pieces {
                let (now, later) = rest.split_at(piece.min(rest.len()));
                hasher.update(now);
                rest = later;
            }
            hasher.update(rest);
            let content = hasher.finish();
            prop_assert_eq!(&content, &Content::of(&all).unwrap());
            let text = serde_json::to_string(&content).unwrap();
            prop_assert_eq!(serde_json::from_str::<Content>(&text).unwrap(), content);
        }
    }
}
