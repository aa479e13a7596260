//! Tests of the proxy between clients on real sockets and sandboxes simulated in this process.
#![allow(clippy::unwrap_used, reason = "tests")]

mod browsers;
mod deadlines;
mod pool;
mod routing;
mod streams;
mod support;
mod tunnel;
mod upgrades;
