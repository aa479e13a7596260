//! Statements on API keys.

use wrenn_model::TeamId;

use super::{ApiKey, columns};
use crate::{backend::Backend, statement::Statement};

/// Inserts a key.
pub(crate) fn insert<B: Backend>(key: &ApiKey) -> Statement<B> {
    Statement::new(
        "store the API key",
        "INSERT INTO api_keys (id, name, key_hash, key_prefix, created_at, team_id, scopes) \
         VALUES ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(&*key.id)
    .bind(&*key.name)
    .bind(&*key.key_hash)
    .bind(&*key.key_prefix)
    .bind(key.created_at)
    .bind(key.team.as_str())
    .bind(key.scopes.to_string())
}

/// Selects all keys of a team, oldest first.
pub(crate) fn of_team<B: Backend>(team: &TeamId) -> Statement<B> {
    Statement::new(
        "list the API keys",
        concat!(
            "SELECT ",
            columns!(),
            " FROM api_keys WHERE team_id = $1 ORDER BY created_at, id"
        ),
    )
    .bind(team.as_str())
}

/// Selects the keys that start with these characters.
pub(crate) fn by_prefix<B: Backend>(prefix: &str) -> Statement<B> {
    Statement::new(
        "look up the API key",
        concat!(
            "SELECT ",
            columns!(),
            " FROM api_keys WHERE key_prefix = $1"
        ),
    )
    .bind(prefix)
}

/// Writes the time of the last use.
pub(crate) fn touch<B: Backend>(id: &str, now_ms: i64) -> Statement<B> {
    Statement::new(
        "record the use of the API key",
        "UPDATE api_keys SET last_used_at = $1 WHERE id = $2",
    )
    .bind(now_ms)
    .bind(id)
}

/// Deletes a key of a team if another key of the team may create keys.
pub(crate) fn delete_unless_last<B: Backend>(team: &TeamId, id: &str) -> Statement<B> {
    Statement::new(
        "delete the API key",
        "DELETE FROM api_keys WHERE id = $1 AND team_id = $2 AND EXISTS (SELECT 1 FROM api_keys AS other \
         WHERE other.id <> $1 AND other.team_id = $2 AND other.scopes LIKE '%keys%')",
    )
    .bind(id)
    .bind(team.as_str())
}

/// Deletes a key.
pub(crate) fn delete<B: Backend>(id: &str) -> Statement<B> {
    Statement::new("delete the API key", "DELETE FROM api_keys WHERE id = $1").bind(id)
}
