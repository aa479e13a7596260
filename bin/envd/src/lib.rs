//! Guest agent (`envd`). Starts processes and transfers files for the host and for clients of E2B's
//! SDKs.
//!
//! One HTTP port serves the Connect services `process.Process` and `filesystem.Filesystem` and a
//! few plain routes. The wire contract is E2B's. envd owns the processes that were started through
//! it, and nothing else in the guest. envd is never process 1 (tini is), so its exit does not end
//! the guest.
//!
//! - [`settings`]: values that the host sets by `/init`: token, environment, defaults.
//! - [`users`], [`paths`]: resolution of names to ids and paths, read from `/etc/passwd` and
//!   `/etc/group` (a static executable has no NSS).
//! - [`auth`]: token, signatures, user of a call.
//! - [`process`]: start, output, input, signals. No output is lost without a mark: see
//!   [`process::output`].
//! - [`filesystem`]: entries, directories, watches.
//! - [`http`]: health, settings, metrics, file transfer, and the host's calls before and after a
//!   snapshot.
//! - [`ports`]: forwarding of loopback ports.
//! - [`cgroups`]: resource priorities of processes.
//! - [`locale`]: default locale of processes.
//! - [`mmds`], [`identity`]: identity of the guest.
//!
//! No module depends on itself through others: [`server`] uses the services and routes, the routes
//! of [`http`] use the state in [`app`], and [`process`] and [`filesystem`] receive what they need.
#![forbid(unsafe_code)]

pub mod app;
pub mod auth;
pub mod cgroups;
pub mod clock;
pub mod connections;
pub mod cpu_use;
pub mod filesystem;
pub mod http;
pub mod http_error;
pub mod identity;
pub mod locale;
pub mod mmds;
pub mod own_limits;
pub mod page_cache;
pub mod paths;
pub mod ports;
pub mod process;
pub mod server;
pub mod settings;
pub mod users;
