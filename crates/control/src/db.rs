//! The rows. SQL lives here and nowhere else; one text serves SQLite and PostgreSQL.
//!
//! Owns the pool of connections and the schema (`migrations/`). Never decides what a status may become: callers bring
//! the row they read, changed by `state_machine`, and an update counts only if the row's version is still that one.
//! A query has a deadline, so that a database which hangs is an error and not a hang.

pub(crate) mod api_keys;
pub(crate) mod sandboxes;
pub(crate) mod templates;

use std::{sync::Once, time::Duration};

use sqlx::{AnyPool, any::AnyPoolOptions};

/// What a query may take.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a caller waits for a connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);

/// Connections at most. SQLite writes one at a time whatever their number; readers go beside.
const MAX_CONNECTIONS: u32 = 8;

/// Why the database did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DbError {
    /// It cannot be reached or opened.
    #[error("cannot open the database")]
    Open {
        /// Why.
        source: sqlx::Error,
    },
    /// Its schema cannot be brought up to date.
    #[error("cannot bring the database's schema up to date")]
    Migrate {
        /// Why.
        source: sqlx::migrate::MigrateError,
    },
    /// A query failed.
    #[error("the database could not {what}")]
    Query {
        /// What was tried.
        what: &'static str,
        /// Why.
        source: sqlx::Error,
    },
    /// A query did not end in time.
    #[error("the database did not {what} within {} s", QUERY_TIMEOUT.as_secs())]
    TimedOut {
        /// What was tried.
        what: &'static str,
    },
    /// A row with this key exists.
    #[error("a row with this key exists")]
    Exists,
    /// A stored value makes no sense.
    #[error("row `{id}` holds a strange `{field}`")]
    Corrupt {
        /// The row.
        id: String,
        /// The column.
        field: &'static str,
    },
}

/// The database.
#[derive(Debug, Clone)]
pub(crate) struct Db {
    pool: AnyPool,
}

impl Db {
    /// Opens it and brings its schema up to date.
    pub(crate) async fn open(url: &str) -> Result<Self, DbError> {
        static DRIVERS: Once = Once::new();
        DRIVERS.call_once(sqlx::any::install_default_drivers);
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

    /// Closes all connections.
    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }
}

/// SQLite only: readers beside the writer, and waiting for the lock instead of failing. With a write-ahead log `NORMAL`
/// loses no committed row when the process dies; when the power fails the sandboxes are gone with it.
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

/// Gives a query its deadline and its error.
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

/// A stored number as the type it has everywhere else.
fn narrow<T: TryFrom<i64>>(id: &str, field: &'static str, value: i64) -> Result<T, DbError> {
    T::try_from(value).map_err(|_| DbError::Corrupt {
        id: id.to_owned(),
        field,
    })
}
