//! Memory statistics of the kernel (`/proc/meminfo`, proc_meminfo(5)).

use std::{fs, io};

const PATH: &str = "/proc/meminfo";

/// Memory statistics at one point in time.
#[derive(Debug, Clone)]
pub struct MemInfo(String);

impl MemInfo {
    /// Reads the statistics of this kernel.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn read() -> io::Result<Self> {
        fs::read_to_string(PATH).map(Self)
    }

    /// Takes statistics in the kernel's format, lines of the form `Name:  NUMBER kB`.
    #[must_use]
    pub fn from_text(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// Returns a field such as `MemAvailable`, in bytes.
    ///
    /// # Errors
    /// Fails if the kernel does not report the field.
    pub fn bytes(&self, field: &str) -> io::Result<u64> {
        let missing = || io::Error::other(format!("`{field}` is missing in {PATH}"));
        self.find(field).ok_or_else(missing)
    }

    fn find(&self, field: &str) -> Option<u64> {
        let mut lines = self.0.lines();
        let value = lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
        let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let info = MemInfo::from_text(
            "MemTotal: 500 kB\nSwapCached: 3 kB\nCached:      120 kB\nShmem:   x kB\n",
        );
        assert_eq!(info.bytes("Cached").expect("reported"), 120 * 1024);
        for missing in ["Shmem", "Mem", "Swap", ""] {
            let error = info.bytes(missing).expect_err("not reported");
            assert!(error.to_string().contains(missing), "{error}");
        }
    }

    #[test]
    fn this_kernel_reports_its_memory() {
        let info = MemInfo::read().expect("Linux");
        let bytes = |field| info.bytes(field).expect("reported");
        assert!(bytes("MemAvailable") > 0 && bytes("MemTotal") >= bytes("MemAvailable"));
        assert!(bytes("Cached") > 0);
    }
}
