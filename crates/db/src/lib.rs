//! Rows of the control plane in SQLite or PostgreSQL.
//!
//! Owns the connections, the schema (`migrations/`) and all SQL. Never decides which status a row
//! may get: callers read a row, change it and pass it back. An update takes effect only if the
//! stored row still has the version that was read.
//!
//! - [`Db`] opens the database that a URL names; [`Database`] lists its operations.
//! - [`Sandbox`] with [`Options`] and [`Page`], [`Template`], [`ApiKey`], `installation`: one
//!   module per kind of row. Each describes its row once, and has its statements in
//!   `statements.rs`.
//! - [`Owner`] restricts a query to the rows of a team.
//! - `statement`, `backend`, `store`: run a statement in either system. The texts of the statements
//!   are the same for both.
//! - `sqlite`, `postgres`: differences between the two, namely connecting and migrating.
//!
//! Failures: every call has a deadline ([`DbError::TimedOut`]), so a database that hangs causes an
//! error, not a hang. After a failure, the next call opens a new connection.
#![forbid(unsafe_code)]

mod api_key;
mod backend;
mod database;
mod db;
mod error;
mod installation;
mod options;
mod owner;
mod page;
mod postgres;
mod sandbox;
mod sqlite;
mod statement;
mod store;
mod template;
mod word;

pub use api_key::ApiKey;
pub use database::Database;
pub use db::Db;
pub use error::DbError;
pub use options::{NetworkLists, Options, ResumeAs};
pub use owner::Owner;
pub use page::{MAX_STATUSES, Page};
pub use sandbox::{DeadlineRow, EndedRow, MAX_LIST, Sandbox, StateRow, UNKNOWN_HOST};
pub use template::Template;
