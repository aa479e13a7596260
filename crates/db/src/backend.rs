//! Database systems that a [`Statement`](crate::statement::Statement) can run in.
//!
//! `sqlx` has one set of types per system. Code that is generic over them needs a list of bounds on
//! each function, so the four operations below are instantiated for both systems instead, and the
//! rest of the crate is generic over [`Backend`] alone.

use sqlx::{
    Arguments as _, Encode, FromRow, Pool, Postgres, Row as _, Sqlite, Type, error::BoxDynError,
    postgres::PgRow, sqlite::SqliteRow,
};

use crate::error::DbError;

/// Value that can be bound in both systems.
pub(crate) trait Param:
    for<'q> Encode<'q, Sqlite> + Type<Sqlite> + for<'q> Encode<'q, Postgres> + Type<Postgres>
{
}

impl<T> Param for T where
    T: for<'q> Encode<'q, Sqlite> + Type<Sqlite> + for<'q> Encode<'q, Postgres> + Type<Postgres>
{
}

/// Value that can be read from a row of both systems.
pub(crate) trait Record:
    for<'r> FromRow<'r, SqliteRow> + for<'r> FromRow<'r, PgRow> + Send
{
}

impl<T> Record for T where T: for<'r> FromRow<'r, SqliteRow> + for<'r> FromRow<'r, PgRow> + Send {}

/// Database system.
pub(crate) trait Backend: sqlx::Database {
    /// Adds the value of the next placeholder.
    fn bind(arguments: &mut Self::Arguments, value: impl Param) -> Result<(), BoxDynError>;

    /// Runs a statement that returns no rows. Returns the number of changed rows.
    fn execute(
        pool: &Pool<Self>,
        sql: &'static str,
        arguments: Self::Arguments,
    ) -> impl Future<Output = sqlx::Result<u64>> + Send;

    /// Runs a statement and returns its rows.
    fn fetch(
        pool: &Pool<Self>,
        sql: &'static str,
        arguments: Self::Arguments,
    ) -> impl Future<Output = sqlx::Result<Vec<Self::Row>>> + Send;

    /// Reads a row. Its first column is the key, which an error names.
    fn read<R: Record>(what: &'static str, row: &Self::Row) -> Result<R, DbError>;
}

macro_rules! backend {
    ($system:ty) => {
        impl Backend for $system {
            fn bind(arguments: &mut Self::Arguments, value: impl Param) -> Result<(), BoxDynError> {
                arguments.add(value)
            }

            async fn execute(
                pool: &Pool<Self>,
                sql: &'static str,
                arguments: Self::Arguments,
            ) -> sqlx::Result<u64> {
                let done = sqlx::query_with(sql, arguments).execute(pool).await?;
                Ok(done.rows_affected())
            }

            async fn fetch(
                pool: &Pool<Self>,
                sql: &'static str,
                arguments: Self::Arguments,
            ) -> sqlx::Result<Vec<Self::Row>> {
                sqlx::query_with(sql, arguments).fetch_all(pool).await
            }

            fn read<R: Record>(what: &'static str, row: &Self::Row) -> Result<R, DbError> {
                R::from_row(row).map_err(|error| {
                    DbError::of_row(what, error, || row.try_get(0).unwrap_or_default())
                })
            }
        }
    };
}

backend!(Sqlite);
backend!(Postgres);
