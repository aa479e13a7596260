//! SQLite: the database is a file that only its owner may access.

mod private;

use std::{str::FromStr as _, time::Duration};

use sqlx::{
    Sqlite, SqlitePool,
    migrate::{MigrateError, Migrator},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use tokio::runtime::Handle;

use crate::{
    error::DbError,
    store::{Store, pool_options, update_schema},
};

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// Maximum time that a statement waits for the lock of a writer. Below the deadline of a query.
const BUSY_TIMEOUT: Duration = Duration::from_secs(8);

/// Writes the log to the database file, and both to the disk.
const FLUSH: &str = "PRAGMA wal_checkpoint(PASSIVE)";

/// Opens the database and updates its schema.
///
/// Readers run beside the writer, and a statement waits for a lock instead of failing. With a
/// write-ahead log, `NORMAL` loses no committed row when the process dies. In a power failure,
/// running sandboxes are lost as well, and for paused sandboxes
/// [`keep`](crate::Database::keep) has been called.
pub(crate) async fn open(url: &str) -> Result<Store<Sqlite>, DbError> {
    let failed = |source| DbError::Open { source };
    let options = SqliteConnectOptions::from_str(url).map_err(failed)?;
    private::restrict(&options, url).map_err(|error| failed(error.into()))?;
    let options = options
        .busy_timeout(BUSY_TIMEOUT)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Normal);
    let pool = pool_options().connect_with(options).await.map_err(failed)?;
    update_schema(migrate(pool.clone())).await?;
    let store = Store::new(pool, Some(FLUSH));
    store.hash_tokens().await?;
    Ok(store)
}

/// Updates the schema in a separate thread. The future of a migrator that borrows its connection
/// is not `Send`.
async fn migrate(pool: SqlitePool) -> Result<(), MigrateError> {
    let runtime = Handle::current();
    let run = move || runtime.block_on(migrate_in_one_transaction(&pool));
    let done = tokio::task::spawn_blocking(run).await;
    done.unwrap_or_else(|error| Err(MigrateError::Source(error.into())))
}

/// Updates the schema. The lock of the transaction keeps other control planes waiting; the migrator
/// itself takes none in SQLite.
async fn migrate_in_one_transaction(pool: &SqlitePool) -> Result<(), MigrateError> {
    let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await?;
    MIGRATIONS.run(&mut *transaction).await?;
    transaction.commit().await?;
    Ok(())
}
