//! Row of the installation: the identity of this database.

use jiff::Timestamp;
use uuid::Uuid;

use crate::{backend::Backend, statement::Statement};

/// Stores a new id unless there is one.
pub(crate) fn insert<B: Backend>() -> Statement<B> {
    Statement::new(
        "store the installation id",
        "INSERT INTO installation (singleton, id, created_at) VALUES (1, $1, $2) \
         ON CONFLICT (singleton) DO NOTHING",
    )
    .bind(Uuid::new_v4().to_string())
    .bind(Timestamp::now().as_millisecond())
}

/// Selects the id.
pub(crate) fn select<B: Backend>() -> Statement<B> {
    Statement::new(
        "read the installation id",
        "SELECT id FROM installation WHERE singleton = 1",
    )
}
