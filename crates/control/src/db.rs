//! Database of the control plane. SQL is confined to this module. The same statements serve SQLite
//! and PostgreSQL.
//!
//! Owns the connection pool and the schema (`migrations/`). Never decides which status a row may
//! get: callers pass the row that they read, changed by `state_machine`, and an update takes effect
//! only if the row still has the version that was read. Every query has a deadline, so a database
//! that hangs causes an error, not a hang.

pub(crate) mod api_keys;
mod installation;
pub(crate) mod options;
pub(crate) mod pages;
mod private;
pub(crate) mod sandboxes;
pub(crate) mod templates;

use std::{sync::Once, time::Duration};

use sqlx::{AnyPool, any::AnyPoolOptions};

/// Maximum duration of a query.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum time that a caller waits for a connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);

/// Maximum number of connections. SQLite has one writer at a time regardless of this number;
/// readers run beside it.
const MAX_CONNECTIONS: u32 = 8;

/// Failure of a database operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DbError {
    /// The database cannot be reached or opened.
    #[error("failed to open the database")]
    Open {
        /// Cause.
        source: sqlx::Error,
    },
    /// The schema cannot be updated.
    #[error("failed to update the schema of the database")]
    Migrate {
        /// Cause.
        source: sqlx::migrate::MigrateError,
    },
    /// A query failed.
    #[error("failed to {what} in the database")]
    Query {
        /// Attempted operation.
        what: &'static str,
        /// Cause.
        source: sqlx::Error,
    },
    /// A query exceeded its deadline.
    #[error("failed to {what} in the database within {} s", QUERY_TIMEOUT.as_secs())]
    TimedOut {
        /// Attempted operation.
        what: &'static str,
    },
    /// A row with this key already exists.
    #[error("a row with this key already exists")]
    Exists,
    /// A stored value is invalid.
    #[error("invalid value in column `{field}` of row `{id}`")]
    Corrupt {
        /// Key of the row.
        id: String,
        /// Column.
        field: &'static str,
    },
}

/// Handle to the database.
#[derive(Debug, Clone)]
pub(crate) struct Db {
    pool: AnyPool,
}

impl Db {
    /// Opens the database and updates its schema.
    pub(crate) async fn open(url: &str) -> Result<Self, DbError> {
        static DRIVERS: Once = Once::new();
        DRIVERS.call_once(sqlx::any::install_default_drivers);
        if url.starts_with("sqlite:") {
            private::keep(url).map_err(|error| DbError::Open {
                source: error.into(),
            })?;
        }
        let pool = AnyPoolOptions::new()
            .max_connections(MAX_CONNECTIONS)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .after_connect(|connection, _| Box::pin(prepare(connection)))
            .connect(url)
            .await
            .map_err(|source| DbError::Open { source })?;
        sqlx::migrate!()
            .run(&pool)
            .await
            .map_err(|source| DbError::Migrate { source })?;
        Ok(Self { pool })
    }

    /// Makes everything written so far survive a power failure. The files of a paused sandbox
    /// survive one, and without its row the sandbox could not be found. PostgreSQL does this at
    /// every commit.
    pub(crate) async fn keep(&self) -> Result<(), DbError> {
        run("flush the write-ahead log", async {
            let mut connection = self.pool.acquire().await?;
            if connection.backend_name() == "SQLite" {
                let flush = sqlx::raw_sql("PRAGMA wal_checkpoint(PASSIVE)");
                flush.execute(&mut *connection).await?;
            }
            Ok(())
        })
        .await
    }

    /// Closes all connections.
    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }
}

/// Configures a connection to SQLite: readers run beside the writer, and a statement waits for a
/// lock instead of failing. With a write-ahead log, `NORMAL` loses no committed row when the
/// process dies. In a power failure, running sandboxes are lost as well, and for paused sandboxes
/// [`Db::keep`] has been called.
async fn prepare(connection: &mut sqlx::AnyConnection) -> Result<(), sqlx::Error> {
    if connection.backend_name() != "SQLite" {
        return Ok(());
    }
    for pragma in [
        "PRAGMA busy_timeout = 8000",
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = NORMAL",
    ] {
        sqlx::raw_sql(pragma).execute(&mut *connection).await?;
    }
    Ok(())
}

/// Runs a query with its deadline, and converts its error.
async fn run<T>(
    what: &'static str,
    query: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, DbError> {
    match tokio::time::timeout(QUERY_TIMEOUT, query).await {
        Err(_) => Err(DbError::TimedOut { what }),
        Ok(Ok(value)) => Ok(value),
        Ok(Err(sqlx::Error::Database(e))) if e.is_unique_violation() => Err(DbError::Exists),
        Ok(Err(source)) => Err(DbError::Query { what, source }),
    }
}

/// Converts a stored number to the type used in the rest of the program.
fn narrow<T: TryFrom<i64>>(id: &str, field: &'static str, value: i64) -> Result<T, DbError> {
    T::try_from(value).map_err(|_| DbError::Corrupt {
        id: id.to_owned(),
        field,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use wrenn_model::OnTimeout;

    use super::*;

    #[tokio::test]
    async fn a_database_of_the_first_release_is_brought_up_to_date_with_its_rows() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/db?mode=rwc", dir.path().display());
        sqlx::any::install_default_drivers();
        let old = AnyPoolOptions::new().connect(&url).await.unwrap();
        let mut first = sqlx::migrate!();
        first.migrations.to_mut().truncate(1);
        first.run(&old).await.unwrap();
        let row = "INSERT INTO sandboxes (id, template, status, vcpus, memory_mb, disk_size_mb, timeout_sec, egress, \
                   created_at, last_updated) VALUES ('sb-1', 'minimal', 'running', 1, 256, 5120, 300, 'deny', 1, 1)";
        sqlx::raw_sql(row).execute(&old).await.unwrap();
        let row = "INSERT INTO templates (name, created_at) VALUES ('minimal', 1)";
        sqlx::raw_sql(row).execute(&old).await.unwrap();
        old.close().await;

        let db = Db::open(&url).await.unwrap();
        let row = db.sandbox(&"sb-1".parse().unwrap()).await.unwrap().unwrap();
        assert_eq!(row.on_timeout, OnTimeout::Pause);
        assert!(!row.auto_resume && row.warning.is_empty());
        assert!(db.update_sandbox(&row).await.unwrap());
        let templates = db.templates().await.unwrap();
        assert_eq!(templates[0].kind, "base");
        assert_eq!(
            (templates[0].disk_size_mb, templates[0].generation),
            (None, None)
        );
    }

    /// Release 0.1.0 had three migrations, and no ids of hosts.
    #[tokio::test]
    async fn a_database_of_release_0_1_0_keeps_its_rows_and_templates() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/db?mode=rwc", dir.path().display());
        sqlx::any::install_default_drivers();
        let old = AnyPoolOptions::new().connect(&url).await.unwrap();
        let mut released = sqlx::migrate!();
        released.migrations.to_mut().truncate(3);
        released.run(&old).await.unwrap();
        let row = "INSERT INTO sandboxes (id, template, status, vcpus, memory_mb, disk_size_mb, timeout_sec, egress, \
                   created_at, last_updated) VALUES ('sb-1', 'minimal', 'paused', 1, 256, 5120, 300, 'deny', 1, 1)";
        sqlx::raw_sql(row).execute(&old).await.unwrap();
        for name in ["minimal", "gone"] {
            let row = format!("INSERT INTO templates (name, created_at) VALUES ('{name}', 1)");
            sqlx::raw_sql(sqlx::AssertSqlSafe(row))
                .execute(&old)
                .await
                .unwrap();
        }
        old.close().await;

        let db = Db::open(&url).await.unwrap();
        let row = db.sandbox(&"sb-1".parse().unwrap()).await.unwrap().unwrap();
        assert!(!row.is_on_other_host("this-host"));
        // What this host does not report is gone; what another one reported stays.
        let mut templates = db.templates().await.unwrap();
        templates.retain(|template| template.name == "minimal");
        db.sync_templates("this-host", &templates).await.unwrap();
        db.sync_templates("other-host", &[]).await.unwrap();
        let names = db.templates().await.unwrap().into_iter().map(|t| t.name);
        assert_eq!(names.collect::<Vec<_>>(), ["minimal"]);
    }

    #[tokio::test]
    async fn an_installation_keeps_its_id_and_another_database_has_another() {
        let dir = tempfile::tempdir().unwrap();
        let url = |name| format!("sqlite://{}/{name}?mode=rwc", dir.path().display());
        let db = Db::open(&url("a")).await.unwrap();
        let (first, second) = tokio::join!(db.installation_id(), db.installation_id());
        let id = first.unwrap();
        assert_eq!(id, second.unwrap());
        db.close().await;
        let again = Db::open(&url("a")).await.unwrap();
        assert_eq!(again.installation_id().await.unwrap(), id);
        let other = Db::open(&url("b")).await.unwrap();
        assert_ne!(other.installation_id().await.unwrap(), id);
    }

    #[tokio::test]
    async fn a_row_is_written_and_removed_at_the_version_that_was_read_only() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/db?mode=rwc", dir.path().display());
        let db = Db::open(&url).await.unwrap();
        let insert = "INSERT INTO sandboxes (id, template, status, vcpus, memory_mb, disk_size_mb, timeout_sec, egress, \
                      created_at, last_updated) VALUES ('sb-1', 'minimal', 'paused', 1, 256, 5120, 300, 'deny', 1, 1)";
        sqlx::raw_sql(insert).execute(&db.pool).await.unwrap();
        let id = "sb-1".parse().unwrap();
        let row = db.sandbox(&id).await.unwrap().unwrap();
        assert!(db.update_sandbox(&row).await.unwrap());
        assert!(!db.update_sandbox(&row).await.unwrap());
        assert!(!db.refresh_sandbox(&row).await.unwrap());
        assert!(!db.remove_sandbox(&id, row.version).await.unwrap());
        assert!(db.remove_sandbox(&id, row.version + 1).await.unwrap());
        assert_eq!(db.sandbox(&id).await.unwrap(), None);
    }
}
