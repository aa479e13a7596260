//! Number of copies of a fork.

use wrenn_model::limits::MAX_FORK_COPIES;

use super::AdmissionError;

/// Checks the number of copies of a fork.
pub(crate) fn check(count: usize) -> Result<(), AdmissionError> {
    let in_range = u32::try_from(count).is_ok_and(|n| (1..=MAX_FORK_COPIES).contains(&n));
    if in_range {
        Ok(())
    } else {
        Err(AdmissionError::Copies { got: count })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_fork_without_copies_and_one_with_too_many_are_rejected_with_the_limit() {
        assert!(check(1).is_ok() && check(100).is_ok());
        assert_eq!(
            check(101).unwrap_err().to_string(),
            "`copy_ids`: 101 copies requested, expected 1 to 100"
        );
        assert!(check(0).is_err());
    }

    proptest! {
        #[test]
        fn no_other_number_of_copies_is_admitted(count: usize) {
            prop_assert_eq!(check(count).is_ok(), (1..=100).contains(&count));
        }
    }
}
