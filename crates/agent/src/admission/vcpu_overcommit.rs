//! Over-commit of virtual CPUs: how many a sandbox may have on this host.

use wrenn_model::limits;

use super::error::{AdmissionError, in_range};

/// Returns the maximum number of virtual CPUs of one sandbox on a host with this many processors.
pub(super) fn max_vcpus(cpu_count: u32) -> u32 {
    limits::MAX_VCPUS.min(cpu_count.saturating_mul(limits::VCPUS_PER_CPU))
}

/// Checks the number of virtual CPUs.
pub(super) fn check(vcpus: u32, cpu_count: u32) -> Result<(), AdmissionError> {
    in_range("vcpus", vcpus, 1, max_vcpus(cpu_count), " on this host")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_number_of_vcpus_is_limited_per_processor(vcpus: u32, cpu_count: u32) {
            let admitted = check(vcpus, cpu_count).is_ok();
            let wide = u64::from(cpu_count) * u64::from(limits::VCPUS_PER_CPU);
            let expected = (1..=limits::MAX_VCPUS).contains(&vcpus) && u64::from(vcpus) <= wide;
            prop_assert_eq!(admitted, expected);
        }

        #[test]
        fn more_processors_never_admit_less(vcpus in 0..64_u32, few in 0..64_u32, more in 0..64_u32) {
            if check(vcpus, few).is_ok() {
                prop_assert!(check(vcpus, few + more).is_ok());
            }
        }

        #[test]
        fn any_host_admits_one_vcpu(cpu_count in 1..=u32::MAX) {
            prop_assert!(check(1, cpu_count).is_ok() && check(0, cpu_count).is_err());
        }
    }
}
