//! Size of a virtual machine.

use serde::{Deserialize, Serialize};

/// Virtual CPUs, memory and disk of a sandbox. Fixed when the sandbox is created; its snapshots and
/// its copies have the same size.
///
/// In files and messages, the fields are `vcpus`, `memory_mib` and `disk_mib` of the object that
/// contains the size (`#[serde(flatten)]`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MachineSize {
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// Disk size as seen by the guest, in MiB.
    pub disk_mib: u32,
}

impl MachineSize {
    /// Returns the size of the memory, in bytes.
    #[must_use]
    pub const fn memory_bytes(self) -> u64 {
        self.memory_mib as u64 * 1024 * 1024
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_stored_with_units_in_its_names() {
        let size = MachineSize {
            vcpus: 2,
            memory_mib: 4096,
            disk_mib: 5120,
        };
        let json = r#"{"vcpus":2,"memory_mib":4096,"disk_mib":5120}"#;
        assert_eq!(serde_json::to_string(&size).ok().as_deref(), Some(json));
        assert_eq!(serde_json::from_str(json).ok(), Some(size));
        assert_eq!(size.memory_bytes(), 4 << 30);
    }
}
