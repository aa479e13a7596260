//! Rows of API keys. The key itself is never stored, only its hash and its first characters.

use sqlx::FromRow;
use wrenn_api_types as rest;

use super::{Db, DbError, run};
use crate::clock;

/// Stored API key.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct ApiKey {
    /// Identifier used to delete the key.
    pub(crate) id: String,
    /// Name chosen by the user.
    pub(crate) name: String,
    /// SHA-256 of the key, hexadecimal.
    pub(crate) key_hash: String,
    /// First eight characters of the key.
    pub(crate) key_prefix: String,
    /// Milliseconds since the Unix epoch.
    pub(crate) created_at: i64,
    /// Milliseconds since the Unix epoch; 0: never.
    pub(crate) last_used_at: i64,
}

impl ApiKey {
    /// Converts the key to the type of the REST API.
    pub(crate) fn into_rest(self) -> rest::ApiKey {
        rest::ApiKey {
            id: self.id,
            name: self.name,
            prefix: self.key_prefix,
            created_at: clock::timestamp(self.created_at),
            last_used_at: clock::optional_timestamp(self.last_used_at),
        }
    }
}

impl Db {
    /// Adds a key.
    pub(crate) async fn insert_api_key(&self, key: &ApiKey) -> Result<(), DbError> {
        let query = sqlx::query(
            "INSERT INTO api_keys (id, name, key_hash, key_prefix, created_at) VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(key.id.clone())
        .bind(key.name.clone())
        .bind(key.key_hash.clone())
        .bind(key.key_prefix.clone())
        .bind(key.created_at);
        run("store the API key", query.execute(&self.pool)).await?;
        Ok(())
    }

    /// Returns all keys, oldest first.
    pub(crate) async fn api_keys(&self) -> Result<Vec<ApiKey>, DbError> {
        let query = sqlx::query_as(
            "SELECT id, name, key_hash, key_prefix, created_at, last_used_at FROM api_keys ORDER BY created_at, id",
        );
        run("list the API keys", query.fetch_all(&self.pool)).await
    }

    /// Returns the keys that start with these eight characters.
    pub(crate) async fn api_keys_by_prefix(&self, prefix: &str) -> Result<Vec<ApiKey>, DbError> {
        let query = sqlx::query_as(
            "SELECT id, name, key_hash, key_prefix, created_at, last_used_at FROM api_keys WHERE key_prefix = $1",
        )
        .bind(prefix.to_owned());
        run("look up the API key", query.fetch_all(&self.pool)).await
    }

    /// Records the use of a key.
    pub(crate) async fn touch_api_key(&self, id: &str, now_ms: i64) -> Result<(), DbError> {
        let query = sqlx::query("UPDATE api_keys SET last_used_at = $1 WHERE id = $2")
            .bind(now_ms)
            .bind(id.to_owned());
        run("record the use of the API key", query.execute(&self.pool)).await?;
        Ok(())
    }

    /// Deletes a key unless it is the last one. Returns false if the key does not exist or is the
    /// last.
    pub(crate) async fn delete_api_key(&self, id: &str) -> Result<bool, DbError> {
        let query = sqlx::query(
            "DELETE FROM api_keys WHERE id = $1 AND EXISTS (SELECT 1 FROM api_keys AS other WHERE other.id <> $2)",
        )
        .bind(id.to_owned())
        .bind(id.to_owned());
        let done = run("delete the API key", query.execute(&self.pool)).await?;
        Ok(done.rows_affected() == 1)
    }

    /// Deletes a key, even the last one.
    pub(crate) async fn drop_api_key(&self, id: &str) -> Result<(), DbError> {
        let query = sqlx::query("DELETE FROM api_keys WHERE id = $1").bind(id.to_owned());
        run("delete the API key", query.execute(&self.pool)).await?;
        Ok(())
    }
}
