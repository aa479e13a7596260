//! PostgreSQL servers for tests.
//!
//! A server belongs to the process that started it, and ends with that process, even if the process
//! is killed (parent-death signal). It runs as the user `postgres` if the tests run as root. It
//! listens on a Unix socket in a private directory, and on 127.0.0.1 only if TLS is requested.
//!
//! `initdb` takes seconds, so it runs once. Its result is kept in a directory that the caller names
//! (`CARGO_TARGET_TMPDIR`), and each server starts from a copy, in a directory that is removed with
//! the process as well.
#![forbid(unsafe_code)]

mod certificates;
mod cluster;
mod command;
mod directory;
mod server;

pub use certificates::Certificates;
pub use server::Server;
