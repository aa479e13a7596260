//! E2B's own SDKs and the Python client of Wrenn: their location (installed by
//! `scripts/setup-sdks`), and the environment that connects them to a `wrenn up`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::Service;

/// Python SDK for tests that need only one; the name of its requirements file.
pub const PYTHON: &str = "e2b-2.63.0";

/// Python client of Wrenn; the name of its requirements file.
pub const WRENN_CLIENT: &str = "wrenn-0.3.0";

/// Returns the directory of the programs that use the SDKs.
#[must_use]
pub fn scenarios() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../e2b")
}

/// Returns the directory of the suite of Wrenn's Python client.
#[must_use]
pub fn wrenn_client_suite() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../wrenn-client")
}

/// Returns the directory `CARGO_TARGET_DIR/sdks`.
#[must_use]
pub fn sdks() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let sdks = target
        .map_or_else(|| root.join("target"), |target| root.join(target))
        .join("sdks");
    sdks.canonicalize().unwrap_or(sdks)
}

/// Sets the three environment variables that a user of an SDK would set.
///
/// # Errors
/// The service has no key for E2B clients.
pub fn point_at(command: &mut Command, service: &Service) -> Result<()> {
    let traffic = format!("http://{}", service.traffic_listen());
    command
        .env("E2B_API_URL", service.url(""))
        .env("E2B_SANDBOX_URL", traffic)
        .env("E2B_API_KEY", service.e2b_key()?)
        .env_remove("E2B_DEBUG")
        .env_remove("E2B_DOMAIN")
        // Proxies of the environment must not be used for addresses of this machine.
        .env("NO_PROXY", "*");
    Ok(())
}

/// Sets the environment variables that a user of Wrenn's Python client would set.
pub fn point_wrenn_client_at(command: &mut Command, service: &Service) {
    let traffic = service.traffic_listen().replace("127.0.0.1", "localhost");
    command
        .env("WRENN_BASE_URL", service.url(""))
        .env("WRENN_API_KEY", service.key())
        .env("WRENN_PROXY_DOMAIN", traffic)
        .env("NO_PROXY", "*");
}
