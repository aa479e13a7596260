//! The guest agent's program: see `USAGE`. It serves until it is killed.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use wrenn_envd::server::{self, Config};
use wrenn_proto::limits::ENVD_CONTRACT_VERSION;

const USAGE: &str = "\
usage: envd [OPTION VALUE]...
  --bind ADDRESS             address to listen on (0.0.0.0)
  --port PORT                port to listen on (49983)
  --forward-address ADDRESS  this machine's address: ports open on 127.0.0.1 or ::1 are forwarded from there (169.254.0.21)
  --metadata ADDRESS:PORT    the metadata service (169.254.169.254:80)
  --cgroup-root DIRECTORY    control groups, version 2 (/sys/fs/cgroup)
  --version                  print the version of the contract that is kept";

fn main() -> ExitCode {
    // Before there is a second thread.
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

/// What is asked for; `None` if only the version is.
fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Config>, String> {
    let mut config = Config::default();
    while let Some(flag) = args.next() {
        if flag == "--version" {
            return Ok(None);
        }
        let mut value = || args.next().ok_or(format!("{flag} needs a value"));
        let wrong = |error: &dyn std::fmt::Display| format!("{flag}: {error}");
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
            other => return Err(format!("unknown argument {other}")),
        }
    }
    Ok(Some(config))
}
