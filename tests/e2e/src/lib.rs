//! Framework of the end-to-end tests: each test gets its own `wrenn up` and helpers to use it.
//!
//! A test reads like the actions of a user: start the service, create a sandbox, run a command,
//! check the result. Every test has its own data directory and ports, so tests can run in parallel.
//! The images are shared (`WRENN_IMAGES_DIR`, built by `make test`). [`Service`] cleans up when it
//! is dropped, even if the test fails.
#![forbid(unsafe_code)]

pub mod bench;
pub mod host;
pub mod sandbox;
pub mod sdks;
pub mod service;
pub mod small_disk;
pub mod vmms;
pub mod wait;
pub mod ws;

pub use sandbox::Sandbox;
pub use service::Service;
pub use small_disk::SmallDisk;

/// Returns the number of rounds of a loop: `full` with `WRENN_SOAK=1` (`make soak`), otherwise a
/// tenth of it.
#[must_use]
pub fn rounds(full: usize) -> usize {
    if std::env::var_os("WRENN_SOAK").is_some_and(|value| value == "1") {
        full
    } else {
        full.div_ceil(10)
    }
}
