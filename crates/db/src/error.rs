//! Failures of database operations.

use std::time::Duration;

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
    #[error("failed to {what} in the database within {} s", limit.as_secs())]
    TimedOut {
        /// Attempted operation.
        what: &'static str,
        /// Time that the operation had.
        limit: Duration,
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
        field: String,
        /// Cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl DbError {
    /// Returns the failure of an attempted operation.
    pub(crate) fn of_query(what: &'static str, error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(error) if error.is_unique_violation() => Self::Exists,
            source => Self::Query { what, source },
        }
    }

    /// Returns the failure to read a row. `id` returns the key of the row.
    pub(crate) fn of_row(
        what: &'static str,
        error: sqlx::Error,
        id: impl FnOnce() -> String,
    ) -> Self {
        match error {
            sqlx::Error::ColumnDecode { index, source } => Self::Corrupt {
                id: id(),
                field: index.trim_matches('"').to_owned(),
                source,
            },
            source => Self::Query { what, source },
        }
    }
}
