//! The `wrenn` binary: thin commands over the crates that do the work.
//!
//! Owns command lines, settings and user-visible output. The two internal commands, which run once
//! per sandbox, are dispatched before anything else is set up: no argument parser, no settings, no
//! runtime. This keeps supervisors small. A failure is reported as one line on standard error that
//! states how to fix it, with exit code 1. Exceptions: 2 for an invalid command line; 127 for a
//! program that does not exist in the sandbox, and 126 for one that cannot be executed, as in a
//! shell.
#![forbid(unsafe_code)]

mod accel;
mod cli;
mod client;
mod commands;
mod config;
mod data_dir;
mod descriptors;
mod doctor;
mod images;
mod internal;
mod interrupt;
mod logging;
mod nameservers;
mod output;
mod service;
mod vmm;

use std::{ffi::OsString, io, process};

use clap::Parser;

/// Exit code of a failure.
const EXIT_FAILURE: i32 = 1;

/// Exit code when the reader of standard output is gone, as a shell reports SIGPIPE.
const EXIT_BROKEN_PIPE: i32 = 141;

fn main() {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some(code) = internal::dispatch(&args) {
        process::exit(code);
    }
    let cli = cli::Cli::parse()
        .checked()
        .unwrap_or_else(|error| error.exit());
    let code = cli.run().unwrap_or_else(|error| report(&error));
    // Exits instead of returning: a thread may still wait for the terminal's next key and would
    // keep the process alive.
    process::exit(code);
}

/// Reports an error in one line, and returns the exit code.
fn report(error: &anyhow::Error) -> i32 {
    let pipe = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe);
    if pipe {
        return EXIT_BROKEN_PIPE;
    }
    output::error(format_args!("wrenn: {}", output::in_full(error.as_ref())));
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<client::ClientError>())
        .find_map(client::ClientError::exit_code)
        .unwrap_or(EXIT_FAILURE)
}
