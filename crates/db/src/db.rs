//! Handle to the database that a URL names.

use std::{ops::Deref, sync::Arc};

use crate::{Database, DbError, postgres, sqlite};

/// Handle to the database. Clones share its connections.
#[derive(Debug, Clone)]
pub struct Db(Arc<dyn Database>);

impl Db {
    /// Opens the database and updates its schema. The URL is `sqlite://PATH?mode=rwc` or
    /// `postgres://…`, with the parameters of libpq, such as `host`, `sslmode` and `sslrootcert`.
    ///
    /// # Errors
    /// [`DbError::Open`] if the URL is invalid or the database is not available, and
    /// [`DbError::Migrate`] if the schema cannot be updated, for example because a newer version of
    /// Wrenn has changed it.
    pub async fn open(url: &str) -> Result<Self, DbError> {
        let scheme = url.split_once(':').map_or("", |(scheme, _)| scheme);
        match scheme {
            "sqlite" => Ok(Self(Arc::new(sqlite::open(url).await?))),
            "postgres" | "postgresql" => Ok(Self(Arc::new(postgres::open(url).await?))),
            _ => Err(DbError::Open {
                source: sqlx::Error::Configuration(
                    "the URL must start with `sqlite:` or `postgres:`".into(),
                ),
            }),
        }
    }
}

impl Deref for Db {
    type Target = dyn Database;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}
