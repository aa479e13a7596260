//! Search for the sandbox of a request that names none: by its token, or by the signature of a link.
//!
//! | request | found by | cost |
//! |---|---|---|
//! | guest agent's token | index on the hash of the token | one row |
//! | link with the sandbox's id | id | one row, one hash |
//! | link of an SDK, again | id that was found before | one row, one hash |
//! | link of an SDK | all tokens of sandboxes that run or are paused | one hash per sandbox |
//!
//! Any client can cause a search, so its cost is bounded: the tokens are read at most once per
//! second, and all searches together compute at most 200 000 hashes per second. The reasons are in
//! `docs/decisions/0022-find-the-sandbox-of-a-request-by-its-token.md`.
//!
//! Another process may create sandboxes, and a new one may be missing from the list of tokens. A link
//! counts as signed by no sandbox only after a search in a list that is newer than the request.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use subtle::ConstantTimeEq as _;
use tokio::time::Instant;
use wrenn_db::{Db, DbError, Owner};
use wrenn_model::{SandboxId, SandboxStatus};
use wrenn_proxy::SignedLink;

/// Time for which a list of tokens is used.
const FRESH: Duration = Duration::from_secs(1);

/// Maximum number of hashes per second, for all searches together: less than a fifth of a processor.
const HASHES_PER_SECOND: f64 = 200_000.0;

/// Number of hashes after which other tasks may run.
const HASHES_AT_ONCE: usize = 256;

/// Maximum number of links whose sandbox is remembered.
const MAX_FOUND: usize = 10_000;

/// Reason for which a search did not take place.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    /// The searches of the last second computed the maximum number of hashes.
    #[error("too many links without a sandbox id are being looked up")]
    Busy,
    /// The database access failed.
    #[error("failed to access the database")]
    Db(#[from] DbError),
}

/// Tokens of all sandboxes that run or are paused.
#[derive(Debug, Clone)]
struct Tokens {
    read_at: Instant,
    all: Arc<[(SandboxId, String)]>,
}

/// Search for the sandboxes of requests.
#[derive(Debug)]
pub struct Unaddressed {
    db: Db,
    tokens: tokio::sync::Mutex<Option<Tokens>>,
    /// Sandboxes of the links that were found last, by signature.
    found: Mutex<HashMap<String, SandboxId>>,
    budget: Mutex<Budget>,
}

impl Unaddressed {
    /// Returns the search for the sandboxes of a database.
    pub fn new(db: Db) -> Self {
        Self {
            db,
            tokens: tokio::sync::Mutex::default(),
            found: Mutex::default(),
            budget: Mutex::new(Budget::full(Instant::now())),
        }
    }

    /// Returns the sandbox whose guest agent has this token. The sandbox may have ended.
    pub async fn with_token(&self, token: &str) -> Result<Option<SandboxId>, SearchError> {
        let holders = self.db.sandboxes_by_token(token).await?;
        let is_same = |known: &str| bool::from(known.as_bytes().ct_eq(token.as_bytes()));
        let holder = holders.into_iter().find(|(_, known)| is_same(known));
        Ok(holder.map(|(id, _)| id))
    }

    /// Returns the sandbox whose guest agent's token signed a link.
    pub async fn signed_by(&self, link: &SignedLink<'_>) -> Result<Option<SandboxId>, SearchError> {
        if let Some(id) = link.sandbox() {
            return Ok(self.has_signed(&id, link).await?.then_some(id));
        }
        let known = self.found.lock().get(link.signature()).cloned();
        if let Some(id) = known
            && self.has_signed(&id, link).await?
        {
            return Ok(Some(id));
        }
        let asked_at = Instant::now();
        loop {
            let tokens = self.tokens().await?;
            // The sandbox may have ended since the list was read.
            if let Some(id) = self.search(&tokens.all, link).await?
                && self.has_signed(&id, link).await?
            {
                self.remember(link, &id);
                return Ok(Some(id));
            }
            if tokens.read_at >= asked_at {
                return Ok(None);
            }
            tokio::time::sleep_until(tokens.read_at + FRESH).await;
        }
    }

    /// True if the token of this sandbox signed the link, and the sandbox has not ended.
    async fn has_signed(&self, id: &SandboxId, link: &SignedLink<'_>) -> Result<bool, SearchError> {
        let row = self.db.sandbox(Owner::Any, id).await?;
        Ok(row.is_some_and(|row| {
            let is_alive = !matches!(
                row.status,
                SandboxStatus::Stopping | SandboxStatus::Stopped | SandboxStatus::Error
            );
            is_alive && !row.envd_token.is_empty() && link.is_signed_with(&row.envd_token)
        }))
    }

    /// Returns the list of tokens, at most [`FRESH`] old. Concurrent callers share one query.
    async fn tokens(&self) -> Result<Tokens, DbError> {
        let mut tokens = self.tokens.lock().await;
        if let Some(tokens) = tokens.as_ref()
            && tokens.read_at.elapsed() < FRESH
        {
            return Ok(tokens.clone());
        }
        let read_at = Instant::now();
        let all = self.db.envd_tokens().await?.into();
        Ok(tokens.insert(Tokens { read_at, all }).clone())
    }

    async fn search(
        &self,
        tokens: &[(SandboxId, String)],
        link: &SignedLink<'_>,
    ) -> Result<Option<SandboxId>, SearchError> {
        if !self.budget.lock().take(tokens.len(), Instant::now()) {
            return Err(SearchError::Busy);
        }
        for some in tokens.chunks(HASHES_AT_ONCE) {
            let signer = some.iter().find(|(_, token)| link.is_signed_with(token));
            if let Some((id, _)) = signer {
                return Ok(Some(id.clone()));
            }
            tokio::task::yield_now().await;
        }
        Ok(None)
    }

    fn remember(&self, link: &SignedLink<'_>, id: &SandboxId) {
        let mut found = self.found.lock();
        if found.len() >= MAX_FOUND {
            found.clear();
        }
        found.insert(link.signature().to_owned(), id.clone());
    }
}

/// Hashes that may be computed now.
#[derive(Debug)]
struct Budget {
    /// Negative after a search with more sandboxes than were left.
    left: f64,
    at: Instant,
}

impl Budget {
    const fn full(now: Instant) -> Self {
        Self {
            left: HASHES_PER_SECOND,
            at: now,
        }
    }

    /// Takes the hashes of a search. Returns false if none are left.
    fn take(&mut self, count: usize, now: Instant) -> bool {
        let refilled = now.duration_since(self.at).as_secs_f64() * HASHES_PER_SECOND;
        self.left = (self.left + refilled).min(HASHES_PER_SECOND);
        self.at = now;
        if self.left <= 0.0 {
            return false;
        }
        self.left -= f64::from(u32::try_from(count).unwrap_or(u32::MAX));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn searches_share_a_refilled_budget() {
        let begun = Instant::now();
        let mut budget = Budget::full(begun);
        for _ in 0..4 {
            assert!(budget.take(50_000, begun));
        }
        assert!(!budget.take(1, begun));
        assert!(budget.take(50_000, begun + Duration::from_millis(250)));
        assert!(!budget.take(1, begun + Duration::from_millis(250)));
        // A search may need more than there is, and is then paid for later.
        let later = begun + Duration::from_secs(60);
        assert!(budget.take(400_000, later));
        assert!(!budget.take(1, later + Duration::from_millis(999)));
        assert!(budget.take(1, later + Duration::from_millis(1100)));
    }
}
