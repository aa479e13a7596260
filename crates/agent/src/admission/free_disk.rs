//! Free disk space of the host.

use super::AdmissionError;

/// Minimum free disk space for a new sandbox, in MiB.
pub(super) const DISK_FLOOR_MIB: u64 = 256;

/// Checks that the host has the space that a new sandbox needs at first. Space for the sandbox's
/// disk is allocated when the guest writes.
pub(super) const fn check(free_mib: u64) -> Result<(), AdmissionError> {
    if free_mib < DISK_FLOOR_MIB {
        return Err(AdmissionError::Disk { free_mib });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn exactly_the_minimum_is_enough(free in 0..1024_u64) {
            prop_assert_eq!(check(free).is_ok(), free >= DISK_FLOOR_MIB);
        }
    }
}
