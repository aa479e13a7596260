//! Statement with its values, before it runs.

use sqlx::error::BoxDynError;

use crate::{
    DbError,
    backend::{Backend, Param},
};

/// Statement with the values of its placeholders (`$1`, `$2`, …).
pub(crate) struct Statement<B: Backend> {
    /// Attempted operation, for errors.
    pub(crate) what: &'static str,
    /// Text of the statement.
    pub(crate) sql: &'static str,
    arguments: Result<B::Arguments, BoxDynError>,
}

impl<B: Backend> Statement<B> {
    /// Returns a statement without values.
    pub(crate) fn new(what: &'static str, sql: &'static str) -> Self {
        Self {
            what,
            sql,
            arguments: Ok(B::Arguments::default()),
        }
    }

    /// Adds the value of the next placeholder.
    pub(crate) fn bind(mut self, value: impl Param) -> Self {
        if let Ok(arguments) = &mut self.arguments
            && let Err(error) = B::bind(arguments, value)
        {
            self.arguments = Err(error);
        }
        self
    }

    /// Returns the values of the placeholders, or the failure to encode one.
    pub(crate) fn arguments(self) -> Result<B::Arguments, DbError> {
        self.arguments
            .map_err(|error| DbError::of_query(self.what, sqlx::Error::Encode(error)))
    }
}
