//! Tests of the database on SQLite and on PostgreSQL. Each scenario is one function that runs on
//! both. The tests start their own PostgreSQL servers.
#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

#[macro_use]
mod support;

mod api_keys;
mod closing;
mod corrupt;
mod files;
mod installation;
mod migrating;
mod outages;
mod paging;
mod racing;
mod sandboxes;
mod templates;
mod tls;
mod urls;
