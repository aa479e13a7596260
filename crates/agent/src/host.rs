//! Capacity of this host, and admission of sandboxes.

use std::{io, path::Path};

use wrenn_model::limits;
use wrenn_sys::meminfo::MemInfo;

/// Host memory that is never promised to a new sandbox, in MiB. Left for the kernel, the agent and
/// the page cache.
const MEMORY_RESERVE_MIB: u64 = 512;

/// Maximum number of virtual CPUs of one sandbox per processor of the host.
const VCPUS_PER_CPU: u32 = 4;

/// Minimum free disk space for a new sandbox, in MiB.
pub(crate) const DISK_FLOOR_MIB: u64 = 256;

/// Maximum time for the VMM to print its version.
const VERSION_DEADLINE: std::time::Duration = std::time::Duration::from_secs(10);

/// Returns kind and version of this host's VMM, such as `qemu 7.2.22`. Only the version that saved
/// the state of a VM can restore it.
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

/// Reason why a sandbox is not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum AdmissionError {
    /// The value of a field is outside the limits of this host, regardless of its current load.
    #[error("`{field}`: {got} is out of range, expected {min} to {max}{why}")]
    OutOfRange {
        field: &'static str,
        got: u32,
        min: u32,
        max: u32,
        why: &'static str,
    },
    /// Not enough memory is available now.
    #[error(
        "not enough memory on the host for `memory_mb` {wanted_mib}: {available_mib} MiB of memory \
         are available, of which {MEMORY_RESERVE_MIB} MiB stay free"
    )]
    Memory { available_mib: u64, wanted_mib: u32 },
    /// Not enough disk space is free now.
    #[error(
        "not enough disk space on the host to create a sandbox: {free_mib} MiB are free, \
         {DISK_FLOOR_MIB} MiB are required"
    )]
    Disk { free_mib: u64 },
}

/// Capacity of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostCapacity {
    pub(crate) cpu_count: u32,
    pub(crate) memory_total_mib: u64,
    pub(crate) memory_available_mib: u64,
    pub(crate) disk_free_mib: u64,
}

impl HostCapacity {
    /// Reads the capacity from the kernel.
    pub(crate) fn read(data_dir: &Path) -> io::Result<Self> {
        let memory = MemInfo::read()?;
        let field_mib = |name| memory.bytes(name).map(|bytes| bytes / (1024 * 1024));
        let cpus = std::thread::available_parallelism()?.get();
        Ok(Self {
            cpu_count: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory_total_mib: field_mib("MemTotal")?,
            memory_available_mib: field_mib("MemAvailable")?,
            disk_free_mib: disk_free_mib(data_dir)?,
        })
    }

    /// Checks that a sandbox of this size can be created now.
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

/// Rejects a value outside a range.
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

/// True if an error means that a file system is full or its quota is used up.
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

    const HOST: HostCapacity = HostCapacity {
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
            text.contains("4096 MiB of memory") && text.contains("`memory_mb` 4096"),
            "{text}"
        );
        let full = HostCapacity {
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
        let facts = HostCapacity::read(Path::new("/")).unwrap();
        assert!(facts.cpu_count > 0 && facts.memory_total_mib >= facts.memory_available_mib);
        assert!(facts.memory_available_mib > 0);
    }
}
