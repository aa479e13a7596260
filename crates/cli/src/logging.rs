//! The log of the services. Client verbs have none: what they have to say goes to the user.

use std::io::{self, IsTerminal};

use anyhow::anyhow;
use tracing_subscriber::EnvFilter;

/// Starts the log on standard error. `filter` is the setting, such as `info` or `wrenn_agent=debug,info`.
pub(crate) fn init(filter: &str, json: bool) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|e| anyhow!("the log filter `{filter}` (WRENN_LOG) is wrong: {e}"))?;
    let log = tracing_subscriber::fmt()
        // A log that nobody reads any more would panic whoever has something to say.
        .log_internal_errors(false)
        .with_env_filter(filter)
        .with_writer(io::stderr);
    let started = if json {
        log.json().try_init()
    } else {
        log.with_ansi(io::stderr().is_terminal()).try_init()
    };
    started.map_err(|e| anyhow!("cannot start the log: {e}"))
}
