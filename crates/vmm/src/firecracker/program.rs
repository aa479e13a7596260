//! Check of the installed program.

use std::{fs, io, path::Path, process::Command, time::Duration};

use wrenn_sys::program::run_within;

use super::version::{MINIMUM, Version};

/// Maximum time for the program to print its version.
const DEADLINE: Duration = Duration::from_secs(10);

/// Maximum size of the program headers that are read, in bytes.
const MAX_HEADERS: usize = 64 * 1024;

/// Reason why a program cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramError {
    /// The file cannot be read or run.
    #[error("`{program}` cannot be run")]
    Io {
        /// Path of the program.
        program: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The file is not a program of this kind of processor.
    #[error("`{0}` is not a 64-bit ELF program")]
    NotElf(String),
    /// The program needs libraries, which its jail does not have.
    #[error("`{0}` is dynamically linked, but its jail has no libraries; install a static build")]
    Dynamic(String),
    /// The program prints no version, or is too old.
    #[error("`{program}` is not Firecracker {MINIMUM} or newer: it prints `{printed}`")]
    Version {
        /// Path of the program.
        program: String,
        /// Beginning of its output.
        printed: String,
    },
}

/// Checks that a file is a Firecracker that the driver supports, and returns its version, such as
/// `1.16.1`. Runs the program, and blocks.
///
/// # Errors
/// See [`ProgramError`].
pub fn examine(program: &Path) -> Result<String, ProgramError> {
    let name = program.display().to_string();
    let failed = |source| ProgramError::Io {
        program: name.clone(),
        source,
    };
    match has_interpreter(&read_start(program).map_err(failed)?) {
        None => return Err(ProgramError::NotElf(name)),
        Some(true) => return Err(ProgramError::Dynamic(name)),
        Some(false) => {}
    }
    let printed = version_output(program).map_err(failed)?;
    // "Firecracker v1.16.1"
    let version = printed
        .strip_prefix("Firecracker v")
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(Version::parse);
    version
        .map(|version| version.as_str().to_owned())
        .ok_or_else(|| ProgramError::Version {
            program: name,
            printed: printed
                .lines()
                .next()
                .unwrap_or_default()
                .escape_debug()
                .take(64)
                .collect(),
        })
}

fn read_start(program: &Path) -> io::Result<Vec<u8>> {
    use io::Read as _;
    let mut start = Vec::new();
    let file = fs::File::open(program)?;
    file.take(MAX_HEADERS as u64).read_to_end(&mut start)?;
    Ok(start)
}

/// True if an ELF program is started by an interpreter, which loads its libraries (program header
/// `PT_INTERP`, `elf(5)`). `None` if the bytes are not the start of a 64-bit little-endian program.
fn has_interpreter(elf: &[u8]) -> Option<bool> {
    const PT_INTERP: u32 = 3;
    // Magic number, 64 bits, little endian.
    elf.strip_prefix(b"\x7fELF\x02\x01")?;
    let u16_at = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let offset = u64::from_le_bytes(elf.get(32..40)?.try_into().ok()?);
    let (size, count) = (usize::from(u16_at(54)?), usize::from(u16_at(56)?));
    let headers = elf.get(usize::try_from(offset).ok()?..)?;
    let mut kinds = headers.chunks_exact(size.max(4)).take(count);
    Some(kinds.any(|header| header.starts_with(&PT_INTERP.to_le_bytes())))
}

fn version_output(program: &Path) -> io::Result<String> {
    let ended = run_within(DEADLINE, Command::new(program).arg("--version"))?;
    Ok(String::from_utf8_lossy(&ended.output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_without_libraries_is_told_from_one_with_libraries() {
        let own = fs::read("/proc/self/exe").expect("read");
        assert_eq!(has_interpreter(&own), Some(true));
        let mut header = [0_u8; 64 + 56];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[32] = 64;
        header[54] = 56;
        header[56] = 1;
        header[64] = 1;
        assert_eq!(has_interpreter(&header), Some(false));
        header[64] = 3;
        assert_eq!(has_interpreter(&header), Some(true));
        assert_eq!(has_interpreter(b"#!/bin/sh\n"), None);
        assert_eq!(has_interpreter(&header[..40]), None);
    }

    #[test]
    fn unusable_programs_are_named_with_the_reason() {
        let error = examine(Path::new("/nowhere/firecracker")).expect_err("missing");
        assert!(
            error.to_string().contains("/nowhere/firecracker"),
            "{error}"
        );
        let error = examine(Path::new("/proc/self/exe")).expect_err("dynamic");
        assert!(matches!(error, ProgramError::Dynamic(_)), "{error}");
        let error = examine(Path::new("/etc/passwd")).expect_err("a text");
        assert!(matches!(error, ProgramError::NotElf(_)), "{error}");
    }
}
