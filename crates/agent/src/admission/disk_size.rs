//! Size of a sandbox's disk.

use wrenn_model::limits;

use super::error::{AdmissionError, in_range};

/// Returns the size of the disk of a sandbox that boots an image, in MiB. A request of 0 stands for
/// the default size. A disk smaller than its image would cut the image off.
pub(super) fn choose(requested_mib: u32, image_mib: u32) -> Result<u32, AdmissionError> {
    let disk_mib = match requested_mib {
        0 => limits::DEFAULT_DISK_MIB,
        size => size,
    };
    let why = " MiB; the minimum is the size of the template's image";
    let max = limits::MAX_DISK_MIB;
    in_range("disk_size_mb", disk_mib, image_mib, max, why)?;
    Ok(disk_mib)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_disk_holds_its_image_and_is_as_large_as_requested(requested: u32, image: u32) {
            if let Ok(disk) = choose(requested, image) {
                prop_assert!((image..=limits::MAX_DISK_MIB).contains(&disk));
                prop_assert!(requested == 0 || disk == requested);
            }
        }

        #[test]
        fn every_size_from_the_image_to_the_maximum_is_admitted(
            image in 0..limits::MAX_DISK_MIB, more: u32,
        ) {
            let size = image.saturating_add(more).clamp(1, limits::MAX_DISK_MIB);
            prop_assert_eq!(choose(size, image).ok(), Some(size));
        }

        #[test]
        fn the_default_is_admitted_unless_the_image_is_larger(image: u32) {
            let expected = (image <= limits::DEFAULT_DISK_MIB).then_some(limits::DEFAULT_DISK_MIB);
            prop_assert_eq!(choose(0, image).ok(), expected);
        }
    }
}
