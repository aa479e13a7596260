//! Log of the services. Client commands do not log: their messages go to the user.

use std::io::{self, IsTerminal};

use anyhow::anyhow;
use tracing_subscriber::EnvFilter;

/// Starts logging to standard error. `filter` is the setting, such as `info` or
/// `wrenn_agent=debug,info`.
pub(crate) fn init(filter: &str, json: bool) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|e| anyhow!("invalid log filter `{filter}` (WRENN_LOG): {e}"))?;
    let log = tracing_subscriber::fmt()
        // When standard error is closed, reporting the failed write would panic in the code that
        // logs.
        .log_internal_errors(false)
        .with_env_filter(filter)
        .with_writer(io::stderr);
    let started = if json {
        log.json().try_init()
    } else {
        log.with_ansi(io::stderr().is_terminal()).try_init()
    };
    started.map_err(|e| anyhow!("failed to start logging: {e}"))
}
