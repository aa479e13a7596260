//! The framework of the end-to-end scenarios: a `wrenn up` of its own for each test, and words to use it.
//!
//! A scenario reads as what a user does: start the service, create a sandbox, run something, look. Every test has its own
//! data directory and ports, so tests run side by side; the images are shared (`WRENN_IMAGES_DIR`, made by `make test`).
//! [`Service`] cleans up when it is dropped, also when the test fails.
#![forbid(unsafe_code)]

pub mod bench;
pub mod host;
pub mod sandbox;
pub mod sdks;
pub mod service;
pub mod small_disk;
pub mod wait;
pub mod ws;

pub use sandbox::Sandbox;
pub use service::Service;
pub use small_disk::SmallDisk;

/// How many times a loop runs: in full with `WRENN_SOAK=1` (`make soak`), a tenth of it otherwise.
#[must_use]
pub fn rounds(full: usize) -> usize {
    if std::env::var_os("WRENN_SOAK").is_some_and(|value| value == "1") {
        full
    } else {
        full.div_ceil(10)
    }
}
