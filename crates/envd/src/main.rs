//! `envd [--bind ADDRESS] [--port PORT]`: serves until it is killed.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, process::ExitCode};

use wrenn_envd::{CONTRACT_VERSION, server};

const USAGE: &str = "usage: envd [--bind ADDRESS] [--port PORT] [--version]";

fn main() -> ExitCode {
    let address = match parse(std::env::args().skip(1)) {
        Ok(Some(address)) => address,
        Ok(None) => {
            println!("{CONTRACT_VERSION}");
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
    match server::run(address) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("envd: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The address to listen on; `None` if only the version is asked for.
fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<SocketAddr>, String> {
    let (mut bind, mut port) = (
        std::net::Ipv4Addr::UNSPECIFIED.into(),
        wrenn_proto::limits::ENVD_PORT,
    );
    while let Some(flag) = args.next() {
        let mut value = || args.next().ok_or(format!("{flag} needs a value"));
        match flag.as_str() {
            "--bind" => bind = value()?.parse().map_err(|e| format!("--bind: {e}"))?,
            "--port" => port = value()?.parse().map_err(|e| format!("--port: {e}"))?,
            "--version" => return Ok(None),
            other => return Err(format!("unknown argument {other}")),
        }
    }
    Ok(Some(SocketAddr::new(bind, port)))
}
