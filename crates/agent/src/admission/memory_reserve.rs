//! Memory of a sandbox: its limits on this host, and the memory that the host keeps for itself.

use wrenn_model::limits;

use super::error::{AdmissionError, in_range};

/// Host memory that is never promised to a new sandbox, in MiB. Left for the kernel, the agent and
/// the page cache.
pub(super) const MEMORY_RESERVE_MIB: u64 = 512;

/// Checks the memory of a sandbox on a host with `total_mib`, of which `available_mib` are
/// available now.
pub(super) fn check(
    memory_mib: u32,
    total_mib: u64,
    available_mib: u64,
) -> Result<(), AdmissionError> {
    let total = u32::try_from(total_mib).unwrap_or(u32::MAX);
    let max = limits::MAX_MEMORY_MIB.min(total);
    let why = " MiB on this host";
    in_range("memory_mb", memory_mib, limits::MIN_MEMORY_MIB, max, why)?;
    if !leaves_reserve(memory_mib, available_mib) {
        return Err(AdmissionError::Memory {
            available_mib,
            wanted_mib: memory_mib,
        });
    }
    Ok(())
}

/// True if the host keeps its reserve after a sandbox of this size was created.
fn leaves_reserve(memory_mib: u32, available_mib: u64) -> bool {
    u64::from(memory_mib) + MEMORY_RESERVE_MIB <= available_mib
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_reserve_is_never_promised(
            memory in 0..10_000_u32, total in 0..20_000_u64, available in 0..20_000_u64,
        ) {
            if check(memory, total, available).is_ok() {
                prop_assert!(available - u64::from(memory) >= MEMORY_RESERVE_MIB);
                prop_assert!(u64::from(memory) <= total);
                prop_assert!(memory >= limits::MIN_MEMORY_MIB);
            }
        }

        #[test]
        fn a_size_that_no_load_admits_is_out_of_range(memory: u32, total: u64, available: u64) {
            let fits_when_idle = check(memory, total, u64::MAX).is_ok();
            match check(memory, total, available) {
                Ok(()) | Err(AdmissionError::Memory { .. }) => prop_assert!(fits_when_idle),
                Err(AdmissionError::OutOfRange { .. }) => prop_assert!(!fits_when_idle),
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }
}
