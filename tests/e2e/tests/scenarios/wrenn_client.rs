//! The unmodified Python client `wrenn` of PyPI against a `wrenn up`: the suite in
//! `tests/wrenn-client`.
//!
//! `scripts/setup-sdks` installs the client and, if necessary, the Python 3.13 that it requires. If
//! neither the machine nor its Debian mirror has one, the suite is ignored (`build.rs`).

use std::process::Command;

use anyhow::Result;
use wrenn_e2e::{
    Service,
    sdks::{self, WRENN_CLIENT, sdks},
};

use super::e2b::run_suite;

#[tokio::test]
#[cfg_attr(
    no_wrenn_client,
    ignore = "the client requires Python 3.13, which scripts/setup-sdks did not find"
)]
async fn python_client_works_unmodified() -> Result<()> {
    let service = Service::start().await?;
    let mut command = Command::new(sdks().join(WRENN_CLIENT).join("bin/python"));
    command
        .args(["-B", "-m", "pytest", "-c", "pytest.ini", "--durations=5"])
        .arg("test_client.py")
        .current_dir(sdks::wrenn_client_suite());
    sdks::point_wrenn_client_at(&mut command, &service);
    run_suite(command, &service).await
}
