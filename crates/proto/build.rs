//! Compiles the `.proto` files with protox (pure Rust), so that no `protoc` is needed on the machine.
use std::{env, fs, path::PathBuf};

const FILES: [&str; 3] = [
    "process/process.proto",
    "filesystem/filesystem.proto",
    "hostagent/v1/hostagent.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(FILES)?;
    let descriptors = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(&descriptors, compiler.encode_file_descriptor_set())?;
    connectrpc_build::Config::new()
        .files(&FILES)
        .descriptor_set(&descriptors)
        .include_file("_connectrpc.rs")
        .compile()?;
    Ok(())
}
