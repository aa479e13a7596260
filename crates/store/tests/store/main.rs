//! Stores of artifacts: a directory, and a real S3 server.
#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

mod cache;
mod contract;
mod remote;
mod support;
