//! Logs of the services and of the supervisors. Client commands do not log: their messages go to
//! the user.

use std::{
    io::{self, IsTerminal},
    path::Path,
    sync::Mutex,
};

use anyhow::{Context as _, anyhow};
use tracing_subscriber::{
    EnvFilter,
    filter::{LevelFilter, Targets},
    fmt,
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};
use wrenn_supervisor::SupervisorLog;

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

/// Starts the log of the supervisor of a sandbox's directory. Its level is `info`, or that of the
/// variable `RUST_LOG` of the host agent. The simple filter keeps supervisors small.
pub(crate) fn init_supervisor(dir: &Path) -> anyhow::Result<()> {
    let log = SupervisorLog::open(dir).context("failed to open the log of the supervisor")?;
    let filter = std::env::var("RUST_LOG").ok();
    let filter = filter.and_then(|filter| filter.parse::<Targets>().ok());
    let filter = filter.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let lines = fmt::layer()
        .json()
        .log_internal_errors(false)
        .with_writer(Mutex::new(log));
    let started = tracing_subscriber::registry()
        .with(lines)
        .with(filter)
        .try_init();
    started.map_err(|e| anyhow!("failed to start logging: {e}"))?;
    std::panic::set_hook(Box::new(
        |panic| tracing::error!(%panic, "supervisor panicked"),
    ));
    Ok(())
}
