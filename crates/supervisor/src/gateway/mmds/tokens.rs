//! Tokens issued to a guest, with their expiry times.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use rand::RngExt as _;

/// Maximum number of stored tokens. A further token replaces the oldest one.
const KEPT: usize = 256;

/// Stored tokens, oldest first.
#[derive(Debug, Default)]
pub(super) struct Tokens(VecDeque<(String, Instant)>);

impl Tokens {
    /// Issues a token.
    pub(super) fn give(&mut self, now: Instant, ttl: Duration) -> String {
        self.0.retain(|(_, end)| *end > now);
        if self.0.len() >= KEPT {
            self.0.pop_front();
        }
        let token = hex::encode(rand::rng().random::<[u8; 24]>());
        self.0.push_back((token.clone(), now + ttl));
        token
    }

    /// True if the token was issued and has not expired.
    pub(super) fn holds(&self, token: &[u8], now: Instant) -> bool {
        let mut good = self.0.iter().filter(|(_, end)| *end > now);
        good.any(|(known, _)| known.as_bytes() == token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_expires_after_its_lifetime() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        let token = tokens.give(now, Duration::from_secs(2));
        assert!(tokens.holds(token.as_bytes(), now + Duration::from_secs(1)));
        assert!(!tokens.holds(token.as_bytes(), now + Duration::from_secs(2)));
        assert!(!tokens.holds(b"", now));
    }

    #[test]
    fn excess_tokens_replace_the_oldest() {
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
