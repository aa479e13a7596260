//! Tells the scenarios if the Python client of Wrenn is installed: `no_wrenn_client` if it is not.

use std::{env, path::PathBuf};

/// Program that runs the client, in the directory of the SDKs (`wrenn_e2e::sdks`).
const PYTHON: &str = "sdks/wrenn-0.3.0/bin/python";

fn main() {
    let root = PathBuf::from("../..");
    let target =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let python = root.join(target).join(PYTHON);
    println!("cargo::rustc-check-cfg=cfg(no_wrenn_client)");
    println!("cargo::rerun-if-env-changed=CARGO_TARGET_DIR");
    println!("cargo::rerun-if-changed={}", python.display());
    if !python.exists() {
        println!("cargo::rustc-cfg=no_wrenn_client");
    }
}
