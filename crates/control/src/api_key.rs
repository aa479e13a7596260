//! API keys.
//!
//! Owns the generation and the check of keys, and a short-lived cache of valid keys. Never stores
//! or logs a key: the database holds its SHA-256 and its first eight characters. A key is looked up
//! by these characters; the hash is then compared in constant time. Keys have at least 128 random
//! bits, so a plain hash is sufficient.
//!
//! A key deleted by this process stops working at once. A key deleted by another process with the
//! same database stops working after `REMEMBER`.

mod first_key;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use rand::RngExt;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use wrenn_db::{ApiKey, Db, DbError};
use wrenn_model::{Scopes, TeamId};

use crate::{clock, principal::Principal};

pub use first_key::ensure_first_keys;

/// Form of a key. All forms grant the same access. Clients of the E2B API check the form of their
/// key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyForm {
    /// `wrn_` and 32 hexadecimal digits.
    Wrenn,
    /// `e2b_` and 40 hexadecimal digits.
    E2b,
}

impl KeyForm {
    const ALL: [Self; 2] = [Self::Wrenn, Self::E2b];

    const fn prefix(self) -> &'static str {
        match self {
            Self::Wrenn => "wrn_",
            Self::E2b => "e2b_",
        }
    }

    /// Number of hexadecimal digits after the prefix.
    const fn digits(self) -> usize {
        match self {
            Self::Wrenn => 32,
            Self::E2b => 40,
        }
    }

    fn fits(self, key: &str) -> bool {
        key.strip_prefix(self.prefix()).is_some_and(|digits| {
            digits.len() == self.digits()
                && digits
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        })
    }
}

/// Number of leading characters of a key that the database stores.
const SHOWN: usize = 8;

/// Time for which a valid key is cached.
const REMEMBER: Duration = Duration::from_secs(5);

/// Maximum number of cached keys.
const MAX_REMEMBERED: usize = 1024;

/// Minimum time between two updates of a key's last use, in milliseconds.
const TOUCH_EVERY_MS: i64 = 60_000;

type Hash = [u8; 32];

/// Generates and checks API keys.
#[derive(Debug)]
pub struct Auth {
    db: Db,
    good: Mutex<HashMap<Hash, (Principal, Instant)>>,
}

/// New key. The secret is not available later.
pub struct NewKey {
    /// The key itself.
    pub secret: String,
    /// Stored row of the key.
    pub row: ApiKey,
}

impl Auth {
    /// Returns the keys of a database.
    pub fn new(db: Db) -> Arc<Self> {
        Arc::new(Self {
            db,
            good: Mutex::default(),
        })
    }

    /// Returns the caller that a key identifies; `None` if the text is not a key of the database.
    pub async fn identify(&self, key: &str) -> Result<Option<Principal>, DbError> {
        if !has_the_form(key) {
            return Ok(None);
        }
        let hash = hash(key);
        if let Some(principal) = self.remembered(&hash) {
            return Ok(Some(principal));
        }
        let Some(prefix) = key.get(..SHOWN) else {
            return Ok(None);
        };
        let wanted = hex::encode(hash);
        let mut found = None;
        // All candidates are compared, even after a match.
        for row in self.db.api_keys_by_prefix(prefix).await? {
            if bool::from(row.key_hash.as_bytes().ct_eq(wanted.as_bytes())) {
                found = Some(row);
            }
        }
        let Some(row) = found else { return Ok(None) };
        let now = clock::now_ms();
        if now.saturating_sub(row.last_used_at) >= TOUCH_EVERY_MS
            && let Err(error) = self.db.touch_api_key(&row.id, now).await
        {
            tracing::warn!(%error, "failed to record API key use");
        }
        let principal = Principal {
            team: row.team,
            key_id: row.id,
            scopes: row.scopes,
        };
        self.remember(hash, principal.clone());
        Ok(Some(principal))
    }

    /// Generates a key of a team and stores it.
    pub async fn make(
        &self,
        team: &TeamId,
        name: &str,
        form: KeyForm,
        scopes: Scopes,
    ) -> Result<NewKey, DbError> {
        let mut digits = vec![0_u8; form.digits() / 2];
        rand::rng().fill(&mut digits[..]);
        let secret = format!("{}{}", form.prefix(), hex::encode(digits));
        let row = ApiKey {
            id: uuid::Uuid::new_v4().to_string(),
            name: name.to_owned(),
            key_hash: hex::encode(hash(&secret)),
            key_prefix: secret.chars().take(SHOWN).collect(),
            created_at: clock::now_ms(),
            last_used_at: 0,
            team: team.clone(),
            scopes,
        };
        self.db.insert_api_key(&row).await?;
        Ok(NewKey { secret, row })
    }

    /// Deletes a key of a team, unless no other key of the team may create keys. Returns false if
    /// nothing was deleted.
    pub async fn delete(&self, team: &TeamId, id: &str) -> Result<bool, DbError> {
        let deleted = self.db.delete_api_key(team, id).await?;
        self.good().retain(|_, (known, _)| known.key_id != id);
        Ok(deleted)
    }

    fn remembered(&self, hash: &Hash) -> Option<Principal> {
        let good = self.good();
        let (principal, since) = good.get(hash)?;
        (since.elapsed() < REMEMBER).then(|| principal.clone())
    }

    fn remember(&self, hash: Hash, principal: Principal) {
        let mut good = self.good();
        if good.len() >= MAX_REMEMBERED {
            good.retain(|_, (_, since)| since.elapsed() < REMEMBER);
        }
        if good.len() < MAX_REMEMBERED {
            good.insert(hash, (principal, Instant::now()));
        }
    }

    fn good(&self) -> MutexGuard<'_, HashMap<Hash, (Principal, Instant)>> {
        self.good.lock()
    }
}

fn has_the_form(key: &str) -> bool {
    KeyForm::ALL.iter().any(|form| form.fits(key))
}

fn hash(key: &str) -> Hash {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::*;

    async fn auth(dir: &tempfile::TempDir) -> Arc<Auth> {
        let url = format!("sqlite://{}/db?mode=rwc", dir.path().display());
        Auth::new(Db::open(&url).await.unwrap())
    }

    async fn make(auth: &Auth, name: &str, form: KeyForm) -> NewKey {
        let team = TeamId::default();
        auth.make(&team, name, form, Scopes::all()).await.unwrap()
    }

    async fn accepts(auth: &Auth, key: &str) -> bool {
        auth.identify(key).await.unwrap().is_some()
    }

    #[tokio::test]
    async fn only_an_existing_key_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let auth = auth(&dir).await;
        let other = make(&auth, "test", KeyForm::E2b).await;
        assert!(other.secret.starts_with("e2b_") && other.secret.len() == 44);
        assert!(accepts(&auth, &other.secret).await);
        let made = make(&auth, "test", KeyForm::Wrenn).await;
        assert!(has_the_form(&made.secret));
        assert!(accepts(&auth, &made.secret).await);
        let mut near = made.secret.clone();
        let last = if near.pop() == Some('0') { '1' } else { '0' };
        near.push(last);
        for bad in [
            near.as_str(),
            "",
            "wrn_",
            &made.secret.to_uppercase(),
            &made.secret[..SHOWN],
            &format!("{} ", made.secret),
            &made.row.key_hash,
            "wrn_ééééééééééééééééé",
        ] {
            assert!(!accepts(&auth, bad).await, "{bad}");
        }
        assert!(
            !made
                .row
                .key_hash
                .contains(&made.secret[KeyForm::Wrenn.prefix().len()..])
        );
    }

    #[tokio::test]
    async fn deleted_key_is_rejected_at_once_and_the_last_one_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let auth = auth(&dir).await;
        let first = make(&auth, "first", KeyForm::Wrenn).await;
        let second = make(&auth, "second", KeyForm::Wrenn).await;
        assert!(accepts(&auth, &second.secret).await);
        assert!(
            auth.delete(&TeamId::default(), &second.row.id)
                .await
                .unwrap()
        );
        assert!(!accepts(&auth, &second.secret).await);
        assert!(
            !auth
                .delete(&TeamId::default(), &first.row.id)
                .await
                .unwrap()
        );
        assert!(accepts(&auth, &first.secret).await);
    }

    #[tokio::test]
    async fn time_of_last_use_is_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let auth = auth(&dir).await;
        let made = make(&auth, "test", KeyForm::Wrenn).await;
        assert_eq!(
            auth.db.api_keys(&TeamId::default()).await.unwrap()[0].last_used_at,
            0
        );
        accepts(&auth, &made.secret).await;
        assert!(auth.db.api_keys(&TeamId::default()).await.unwrap()[0].last_used_at > 0);
    }
}
