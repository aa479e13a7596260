//! Rows of API keys: never the key, only its hash and its first characters.

use sqlx::FromRow;
use wrenn_proto::rest;

use super::{Db, DbError, run};
use crate::clock;

/// A key as it is stored.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct ApiKey {
    /// By which it is deleted.
    pub(crate) id: String,
    /// The user's word for it.
    pub(crate) name: String,
    /// Hexadecimal SHA-256.
    pub(crate) key_hash: String,
    /// First eight characters.
    pub(crate) key_prefix: String,
    /// Milliseconds since 1970.
    pub(crate) created_at: i64,
    /// Milliseconds since 1970; 0: never.
    pub(crate) last_used_at: i64,
}

impl ApiKey {
    /// As the API shows it.
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

    /// All keys, oldest first.
    pub(crate) async fn api_keys(&self) -> Result<Vec<ApiKey>, DbError> {
        let query = sqlx::query_as(
            "SELECT id, name, key_hash, key_prefix, created_at, last_used_at FROM api_keys ORDER BY created_at, id",
        );
        run("list the API keys", query.fetch_all(&self.pool)).await
    }

    /// Keys that begin with these eight characters.
    pub(crate) async fn api_keys_by_prefix(&self, prefix: &str) -> Result<Vec<ApiKey>, DbError> {
        let query = sqlx::query_as(
            "SELECT id, name, key_hash, key_prefix, created_at, last_used_at FROM api_keys WHERE key_prefix = $1",
        )
        .bind(prefix.to_owned());
        run("look up the API key", query.fetch_all(&self.pool)).await
    }

    /// Notes that a key was used.
    pub(crate) async fn touch_api_key(&self, id: &str, now_ms: i64) -> Result<(), DbError> {
        let query = sqlx::query("UPDATE api_keys SET last_used_at = $1 WHERE id = $2")
            .bind(now_ms)
            .bind(id.to_owned());
        run("note the use of the API key", query.execute(&self.pool)).await?;
        Ok(())
    }

    /// Deletes a key unless it is the last one. False if there is no such key or no other.
    pub(crate) async fn delete_api_key(&self, id: &str) -> Result<bool, DbError> {
        let query = sqlx::query(
            "DELETE FROM api_keys WHERE id = $1 AND EXISTS (SELECT 1 FROM api_keys AS other WHERE other.id <> $2)",
        )
        .bind(id.to_owned())
        .bind(id.to_owned());
        let done = run("delete the API key", query.execute(&self.pool)).await?;
        Ok(done.rows_affected() == 1)
    }

    /// Deletes a key, the last one too.
    pub(crate) async fn drop_api_key(&self, id: &str) -> Result<(), DbError> {
        let query = sqlx::query("DELETE FROM api_keys WHERE id = $1").bind(id.to_owned());
        run("delete the API key", query.execute(&self.pool)).await?;
        Ok(())
    }
}
