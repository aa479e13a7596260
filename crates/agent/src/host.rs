//! Properties of this host: its VMM and its capacity.

use std::{io, path::Path};

use wrenn_sys::meminfo::MemInfo;

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

    #[test]
    fn capacity_of_this_host_is_not_zero() {
        let facts = HostCapacity::read(Path::new("/")).unwrap();
        assert!(facts.cpu_count > 0 && facts.memory_total_mib >= facts.memory_available_mib);
        assert!(facts.memory_available_mib > 0);
    }
}
