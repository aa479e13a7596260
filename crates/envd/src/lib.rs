//! The agent in the guest: starts processes and moves files, for the host and for clients of E2B's SDKs.
//!
//! One HTTP port serves the Connect services `process.Process` and `filesystem.Filesystem` and a few plain routes. The
//! wire contract is E2B's. It owns the processes that were started through it, and nothing else of the guest; it never
//! is process 1 (tini is), so that its end ends no guest.
//!
//! - [`settings`]: what the host told by `/init`: token, environment, defaults.
//! - [`users`], [`paths`]: names to ids and paths, read from `/etc/passwd` and `/etc/group` (a static executable has no NSS).
//! - [`auth`]: token, signatures, user of a call.
//! - [`process`]: start, follow, feed, signal. Output is never lost: see [`process::output`].
//! - [`filesystem`]: entries, directories, watches.
//! - [`http`]: health, settings, metrics, file transfer, and the host's word before and after a freeze.
//! - [`ports`]: servers that listen inside only are made reachable.
//! - [`cgroups`]: which processes yield to which.
//! - [`mmds`], [`identity`]: who this machine is.
#![forbid(unsafe_code)]

pub mod auth;
pub mod cgroups;
pub mod clock;
pub mod connections;
pub mod filesystem;
pub mod http;
pub mod identity;
pub mod mmds;
pub mod own_limits;
pub mod page_cache;
pub mod paths;
pub mod ports;
pub mod process;
pub mod server;
pub mod settings;
pub mod users;
