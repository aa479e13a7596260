//! The proxy between clients on real sockets and sandboxes that exist in this process only.
#![allow(clippy::unwrap_used, reason = "tests")]

mod browsers;
mod deadlines;
mod pool;
mod routing;
mod streams;
mod support;
mod tunnel;
mod upgrades;
