//! Program of the guest agent (see `USAGE`). Serves until it is killed.
#![forbid(unsafe_code)]

use std::{process::ExitCode, time::Duration};

use wrenn_envd::server::{self, Config};
use wrenn_proto::guest::ENVD_CONTRACT_VERSION;

const USAGE: &str = "\
usage: envd [OPTION VALUE]...
  --bind ADDRESS             address to listen on (default 0.0.0.0)
  --port PORT                port to listen on (default 49983)
  --forward-address ADDRESS  guest address on which ports of 127.0.0.1 and ::1 are forwarded (default 169.254.0.21)
  --metadata ADDRESS:PORT    address of the metadata service (default 169.254.169.254:80)
  --cgroup-root DIRECTORY    root of the cgroup v2 hierarchy (default /sys/fs/cgroup)
  --patience SECONDS         time after which a client that takes no output is dropped (default 300)
  --version                  print the version of the envd contract and exit";

fn main() -> ExitCode {
    // Must run before a second thread exists.
    wrenn_sys::heap::keep_little();
    let config = match parse(std::env::args().skip(1)) {
        Ok(Some(config)) => config,
        Ok(None) => {
            println!("{ENVD_CONTRACT_VERSION}");
            return ExitCode::SUCCESS;
        }
        Err(problem) => {
            eprintln!("envd: {problem}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_max_level(tracing::Level::WARN)
        .init();
    match server::run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("envd: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Parses the arguments. Returns `None` if only the version was requested.
fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Config>, String> {
    let mut config = Config::default();
    while let Some(flag) = args.next() {
        if flag == "--version" {
            return Ok(None);
        }
        let mut value = || args.next().ok_or(format!("`{flag}` requires a value"));
        let wrong = |error: &dyn std::fmt::Display| format!("invalid value for `{flag}`: {error}");
        match flag.as_str() {
            "--bind" => config
                .address
                .set_ip(value()?.parse().map_err(|e| wrong(&e))?),
            "--port" => config
                .address
                .set_port(value()?.parse().map_err(|e| wrong(&e))?),
            "--forward-address" => {
                config.forward_address = value()?.parse().map_err(|e| wrong(&e))?;
            }
            "--metadata" => config.metadata_address = value()?.parse().map_err(|e| wrong(&e))?,
            "--cgroup-root" => config.cgroup_root = value()?.into(),
            "--patience" => {
                config.patience = Duration::from_secs(value()?.parse().map_err(|e| wrong(&e))?);
            }
            other => return Err(format!("unknown argument `{other}`")),
        }
    }
    Ok(Some(config))
}
