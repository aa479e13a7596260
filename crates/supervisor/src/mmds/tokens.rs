//! Tokens that a guest was given, and until when they are good.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use rand::RngExt as _;

/// How many are kept: whoever asks for more forgets the oldest.
const KEPT: usize = 256;

/// All that are kept, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Tokens(VecDeque<(String, Instant)>);

impl Tokens {
    /// A new one.
    pub(super) fn give(&mut self, now: Instant, ttl: Duration) -> String {
        self.0.retain(|(_, end)| *end > now);
        if self.0.len() >= KEPT {
            self.0.pop_front();
        }
        let token = hex::encode(rand::rng().random::<[u8; 24]>());
        self.0.push_back((token.clone(), now + ttl));
        token
    }

    /// Whether it was given and is still good.
    pub(super) fn holds(&self, token: &[u8], now: Instant) -> bool {
        let mut good = self.0.iter().filter(|(_, end)| *end > now);
        good.any(|(known, _)| known.as_bytes() == token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_ends_when_its_time_is_over() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        let token = tokens.give(now, Duration::from_secs(2));
        assert!(tokens.holds(token.as_bytes(), now + Duration::from_secs(1)));
        assert!(!tokens.holds(token.as_bytes(), now + Duration::from_secs(2)));
        assert!(!tokens.holds(b"", now));
    }

    #[test]
    fn who_asks_for_many_loses_the_oldest_and_takes_no_more_room() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        let first = tokens.give(now, Duration::from_secs(9));
        let later: Vec<_> = (0..KEPT)
            .map(|_| tokens.give(now, Duration::from_secs(9)))
            .collect();
        assert!(!tokens.holds(first.as_bytes(), now));
        assert!(
            later
                .iter()
                .all(|token| tokens.holds(token.as_bytes(), now))
        );
        assert_eq!(tokens.0.len(), KEPT);
    }
}
