//! Capacity of this host.

use std::{io, path::Path};

use wrenn_sys::meminfo::MemInfo;

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
