//! What this machine has, and whether a sandbox fits in.

use std::{fs, io, path::Path};

use wrenn_proto::limits;

/// Host memory that is never promised to a new sandbox, MiB: for the kernel, the agent, and the page cache.
const MEMORY_RESERVE_MIB: u64 = 512;

/// Virtual CPUs that one sandbox may have for each of the host's.
const VCPUS_PER_CPU: u32 = 4;

/// Free space below which no sandbox is made, MiB.
pub(crate) const DISK_FLOOR_MIB: u64 = 256;

/// How long the VMM may take to tell its version.
const VERSION_DEADLINE: std::time::Duration = std::time::Duration::from_secs(10);

/// Kind and version of the VMM of this host, such as `qemu 7.2.22`: a machine's state fits the version that it was saved by.
pub(crate) async fn vmm() -> String {
    let run = tokio::process::Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(VERSION_DEADLINE, run).await;
    let text = match output {
        Ok(Ok(output)) => String::from_utf8_lossy(&output.stdout).into_owned(),
        _ => String::new(),
    };
    // "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"
    let version = text.split_whitespace().nth(3).unwrap_or("unknown");
    format!("qemu {version}")
}

/// Why a sandbox does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum AdmissionError {
    /// A field has a value that no state of this host would allow.
    #[error("{field} is {got}; it must be from {min} to {max}{why}")]
    OutOfRange {
        field: &'static str,
        got: u32,
        min: u32,
        max: u32,
        why: &'static str,
    },
    /// Not enough memory now.
    #[error(
        "the host has {available_mib} MiB of memory available, of which {MEMORY_RESERVE_MIB} MiB are kept free: \
         not enough for memory_mb {wanted_mib}"
    )]
    Memory { available_mib: u64, wanted_mib: u32 },
    /// Not enough disk now.
    #[error(
        "the host has {free_mib} MiB of disk free; {DISK_FLOOR_MIB} MiB must stay free to make a sandbox"
    )]
    Disk { free_mib: u64 },
}

/// What a machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) cpu_count: u32,
    pub(crate) memory_total_mib: u64,
    pub(crate) memory_available_mib: u64,
    pub(crate) disk_free_mib: u64,
}

impl Facts {
    /// Asks the kernel.
    pub(crate) fn read(data_dir: &Path) -> io::Result<Self> {
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let field_mib = |name| {
            meminfo_kib(&meminfo, name)
                .map(|kib| kib / 1024)
                .ok_or_else(|| io::Error::other(format!("/proc/meminfo has no {name}")))
        };
        let cpus = std::thread::available_parallelism()?.get();
        Ok(Self {
            cpu_count: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory_total_mib: field_mib("MemTotal")?,
            memory_available_mib: field_mib("MemAvailable")?,
            disk_free_mib: disk_free_mib(data_dir)?,
        })
    }

    /// Whether a sandbox of this size can be made now.
    pub(crate) fn admit(&self, vcpus: u32, memory_mib: u32) -> Result<(), AdmissionError> {
        let max_vcpus = limits::MAX_VCPUS.min(self.cpu_count.saturating_mul(VCPUS_PER_CPU));
        in_range("vcpus", vcpus, 1, max_vcpus, " on this host")?;
        let total = u32::try_from(self.memory_total_mib).unwrap_or(u32::MAX);
        let max_memory = limits::MAX_MEMORY_MIB.min(total);
        let why = " MiB on this host";
        in_range(
            "memory_mb",
            memory_mib,
            limits::MIN_MEMORY_MIB,
            max_memory,
            why,
        )?;
        if u64::from(memory_mib) + MEMORY_RESERVE_MIB > self.memory_available_mib {
            return Err(AdmissionError::Memory {
                available_mib: self.memory_available_mib,
                wanted_mib: memory_mib,
            });
        }
        if self.disk_free_mib < DISK_FLOOR_MIB {
            return Err(AdmissionError::Disk {
                free_mib: self.disk_free_mib,
            });
        }
        Ok(())
    }
}

/// Refuses a value outside of a range.
pub(crate) fn in_range(
    field: &'static str,
    got: u32,
    min: u32,
    max: u32,
    why: &'static str,
) -> Result<(), AdmissionError> {
    if (min..=max).contains(&got) {
        return Ok(());
    }
    Err(AdmissionError::OutOfRange {
        field,
        got,
        min,
        max,
        why,
    })
}

fn disk_free_mib(path: &Path) -> io::Result<u64> {
    let fs = rustix::fs::statvfs(path)?;
    Ok(fs.f_bavail.saturating_mul(fs.f_frsize) / (1024 * 1024))
}

fn meminfo_kib(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

/// Whether an error says that a file system is full.
pub(crate) fn is_out_of_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const HOST: Facts = Facts {
        cpu_count: 2,
        memory_total_mib: 8192,
        memory_available_mib: 4096,
        disk_free_mib: 10_000,
    };

    #[test]
    fn what_fits_is_admitted() {
        assert_eq!(HOST.admit(8, 4096 - 512), Ok(()));
        assert_eq!(HOST.admit(1, 128), Ok(()));
    }

    #[test]
    fn a_value_out_of_range_is_named() {
        for (vcpus, memory, field) in [
            (0, 512, "vcpus"),
            (9, 512, "vcpus"),
            (10_000, 512, "vcpus"),
            (1, 127, "memory_mb"),
            (1, 8193, "memory_mb"),
        ] {
            let error = HOST.admit(vcpus, memory).unwrap_err();
            assert!(
                matches!(error, AdmissionError::OutOfRange { .. }),
                "{error}"
            );
            assert!(error.to_string().contains(field), "{error}");
        }
    }

    #[test]
    fn a_shortage_is_told_with_its_numbers() {
        let error = HOST.admit(1, 4096).unwrap_err();
        assert!(matches!(error, AdmissionError::Memory { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains("4096 MiB of memory") && text.contains("memory_mb 4096"),
            "{text}"
        );
        let full = Facts {
            disk_free_mib: 255,
            ..HOST
        };
        assert_eq!(
            full.admit(1, 512),
            Err(AdmissionError::Disk { free_mib: 255 })
        );
    }

    #[test]
    fn this_machine_has_something_of_everything() {
        let facts = Facts::read(Path::new("/")).unwrap();
        assert!(facts.cpu_count > 0 && facts.memory_total_mib >= facts.memory_available_mib);
        assert!(facts.memory_available_mib > 0);
    }
}
