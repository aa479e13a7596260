//! Memory of a sandbox: its limits on this host. Whether it is available now is checked when it is
//! reserved (`memory_ledger`).

use wrenn_model::limits;

use super::error::{AdmissionError, in_range};

/// Checks the memory of a sandbox on a host with `total_mib`.
pub(super) fn check(memory_mib: u32, total_mib: u64) -> Result<(), AdmissionError> {
    let total = u32::try_from(total_mib).unwrap_or(u32::MAX);
    let max = limits::MAX_MEMORY_MIB.min(total);
    let why = " MiB on this host";
    in_range("memory_mb", memory_mib, limits::MIN_MEMORY_MIB, max, why)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_sandbox_never_gets_more_memory_than_the_host_has(memory: u32, total: u64) {
            let range = limits::MIN_MEMORY_MIB..=limits::MAX_MEMORY_MIB;
            let fits = range.contains(&memory) && u64::from(memory) <= total;
            prop_assert_eq!(check(memory, total).is_ok(), fits);
        }
    }
}
