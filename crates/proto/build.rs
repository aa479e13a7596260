//! Compiles the `.proto` files with protox (pure Rust), so that no `protoc` is needed on the
//! machine.
use std::{env, fs::File, io::Write as _, path::PathBuf, time::SystemTime};

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
    let mut file = File::create(&descriptors)?;
    file.write_all(&compiler.encode_file_descriptor_set())?;
    // The code generator makes Cargo watch this file. Cargo considers a file that is newer than the
    // start of this program as changed, so without an old timestamp this crate and all crates that
    // depend on it would be rebuilt every time.
    file.set_modified(SystemTime::UNIX_EPOCH)?;
    connectrpc_build::Config::new()
        .files(&FILES)
        .descriptor_set(&descriptors)
        .include_file("_connectrpc.rs")
        .compile()?;
    Ok(())
}
