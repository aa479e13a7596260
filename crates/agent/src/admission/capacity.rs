//! Capacity of this host for one more sandbox.

use wrenn_model::MachineSize;

use super::{AdmissionError, memory_size, vcpu_overcommit};
use crate::host::HostCapacity;

/// Checks that a sandbox of this size can be created on this host, if its memory can be reserved.
pub(super) fn check(host: &HostCapacity, size: MachineSize) -> Result<(), AdmissionError> {
    vcpu_overcommit::check(size.vcpus, host.cpu_count)?;
    memory_size::check(size.memory_mib, host.memory_total_mib)
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

    const fn size(vcpus: u32, memory_mib: u32) -> MachineSize {
        MachineSize {
            vcpus,
            memory_mib,
            disk_mib: 1024,
        }
    }

    #[test]
    fn a_sandbox_that_fits_is_admitted() {
        assert!(check(&HOST, size(8, 8192)).is_ok());
        assert!(check(&HOST, size(1, 128)).is_ok());
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
            let error = check(&HOST, size(vcpus, memory)).unwrap_err();
            assert!(
                matches!(error, AdmissionError::OutOfRange { .. }),
                "{error}"
            );
            assert!(error.to_string().contains(field), "{error}");
        }
    }
}
