//! Encoding of output: text where it is UTF-8, base64 otherwise.
//!
//! A piece of output may end in the middle of a character. An incomplete character at the end is
//! kept for the next piece: at most three bytes.

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};

/// Piece of output, encoded for a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// UTF-8 text.
    Text(String),
    /// Bytes that are not UTF-8, in base64.
    Base64(String),
}

impl Piece {
    fn of(bytes: Vec<u8>) -> Self {
        match String::from_utf8(bytes) {
            Ok(text) => Self::Text(text),
            Err(error) => Self::Base64(BASE64.encode(error.as_bytes())),
        }
    }
}

/// Decoder of one output stream.
#[derive(Debug, Default)]
pub(super) struct TextStream {
    kept: Vec<u8>,
}

impl TextStream {
    /// Takes the next bytes. Returns `None` if they complete no character yet.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Option<Piece> {
        let mut all = std::mem::take(&mut self.kept);
        all.extend_from_slice(bytes);
        self.kept = all.split_off(all.len() - unfinished(&all));
        (!all.is_empty()).then(|| Piece::of(all))
    }

    /// Ends the stream. Returns the kept bytes, which are an incomplete character.
    pub(super) fn finish(&mut self) -> Option<Piece> {
        let kept = std::mem::take(&mut self.kept);
        (!kept.is_empty()).then(|| Piece::of(kept))
    }
}

/// Returns the length of the incomplete character at the end of `bytes`, or 0.
pub(super) fn unfinished(bytes: &[u8]) -> usize {
    // An incomplete character has at most three bytes.
    let tail = &bytes[bytes.len().saturating_sub(3)..];
    let last = tail.utf8_chunks().last().map_or(&[][..], |c| c.invalid());
    let incomplete = std::str::from_utf8(last).is_err_and(|e| e.error_len().is_none());
    if incomplete { last.len() } else { 0 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use proptest::prelude::*;

    use super::*;

    fn bytes(piece: Piece) -> Vec<u8> {
        match piece {
            Piece::Text(text) => text.into_bytes(),
            Piece::Base64(text) => BASE64.decode(text).unwrap(),
        }
    }

    fn cut(all: &[u8], mut at: Vec<usize>) -> Vec<Piece> {
        at.push(all.len());
        at.sort_unstable();
        let (mut stream, mut from, mut pieces) = (TextStream::default(), 0, Vec::new());
        for to in at {
            pieces.extend(stream.push(&all[from..to]));
            from = to;
        }
        pieces.extend(stream.finish());
        pieces
    }

    #[test]
    fn character_is_not_split_across_pieces() {
        let mut stream = TextStream::default();
        assert_eq!(stream.push(b"a\xe2"), Some(Piece::Text("a".into())));
        assert_eq!(stream.push(b"\x82"), None);
        assert_eq!(stream.push(b"\xacb"), Some(Piece::Text("€b".into())));
        assert_eq!(stream.finish(), None);
    }

    #[test]
    fn invalid_utf8_is_base64() {
        let mut stream = TextStream::default();
        assert_eq!(stream.push(b"\xff"), Some(Piece::Base64("/w==".into())));
        assert_eq!(stream.push(b"ok\xe2"), Some(Piece::Text("ok".into())));
        assert_eq!(stream.finish(), Some(Piece::Base64("4g==".into())));
    }

    proptest! {
        #[test]
        fn text_stays_text_for_any_split(text in "\\PC{0,40}", at in proptest::collection::vec(any::<prop::sample::Index>(), 0..8)) {
            let at = at.iter().map(|i| i.index(text.len() + 1)).collect();
            let mut seen = String::new();
            for piece in cut(text.as_bytes(), at) {
                match piece {
                    Piece::Text(text) => seen.push_str(&text),
                    Piece::Base64(_) => prop_assert!(false, "not text"),
                }
            }
            prop_assert_eq!(seen, text);
        }

        #[test]
        fn output_is_preserved_byte_by_byte(all in proptest::collection::vec(any::<u8>(), 0..60), at in proptest::collection::vec(any::<prop::sample::Index>(), 0..8)) {
            let at = at.iter().map(|i| i.index(all.len() + 1)).collect();
            let seen: Vec<u8> = cut(&all, at).into_iter().flat_map(bytes).collect();
            prop_assert_eq!(seen, all);
        }
    }
}
