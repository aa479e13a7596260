//! PostgreSQL: several control planes may share one database.

mod url;

use std::str::FromStr as _;

use sqlx::{
    Postgres,
    migrate::{MigrateError, Migrator},
    postgres::PgConnectOptions,
};

use crate::{
    error::DbError,
    store::{Store, pool_options, update_schema},
};

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/postgres");

/// Limits the duration of a statement in the server. The limit is below the deadline of a query:
/// otherwise a statement that waits for a lock could take effect after its caller received an
/// error.
const LIMIT_STATEMENTS: &str = "SET statement_timeout = '8s'";

/// Connects to the database and updates its schema. A commit of PostgreSQL survives a power
/// failure, so [`keep`](crate::Database::keep) has nothing to do.
pub(crate) async fn open(url: &str) -> Result<Store<Postgres>, DbError> {
    let failed = |source| DbError::Open { source };
    let options = PgConnectOptions::from_str(&url::with_host(url)).map_err(failed)?;
    let pool = pool_options()
        .after_connect(|connection, _| {
            Box::pin(async move {
                sqlx::raw_sql(LIMIT_STATEMENTS).execute(connection).await?;
                Ok(())
            })
        })
        .connect_with(options.clone())
        .await
        .map_err(failed)?;
    update_schema(migrate(options)).await?;
    let store = Store::new(pool, None);
    store.hash_tokens().await?;
    Ok(store)
}

/// Updates the schema on a connection without a limit for statements. The migrator holds an
/// advisory lock, so control planes that start at the same time update the schema one after
/// another.
async fn migrate(options: PgConnectOptions) -> Result<(), MigrateError> {
    let pool = pool_options::<Postgres>().connect_with(options).await?;
    MIGRATIONS.run(&pool).await?;
    pool.close().await;
    Ok(())
}
