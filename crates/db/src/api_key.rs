//! Rows of API keys. The key itself is never stored, only its hash and its first characters.

pub(crate) mod statements;

use sqlx::FromRow;
use wrenn_model::{Scopes, TeamId};

use crate::word::Word;

/// Columns of [`ApiKey`], beginning with its key.
macro_rules! columns {
    () => {
        "id, name, key_hash, key_prefix, created_at, last_used_at, team_id, scopes"
    };
}

use columns;

/// Stored API key.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct ApiKey {
    /// Identifier used to delete the key.
    pub id: String,
    /// Name chosen by the user.
    pub name: String,
    /// SHA-256 of the key, hexadecimal.
    pub key_hash: String,
    /// First eight characters of the key.
    pub key_prefix: String,
    /// Milliseconds since the Unix epoch.
    pub created_at: i64,
    /// Milliseconds since the Unix epoch; 0: never.
    pub last_used_at: i64,
    /// Team that the key belongs to.
    #[sqlx(rename = "team_id", try_from = "Word")]
    pub team: TeamId,
    /// Scopes of the key.
    #[sqlx(try_from = "Word")]
    pub scopes: Scopes,
}
