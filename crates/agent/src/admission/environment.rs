//! Environment of a sandbox: names and values of its variables.

use std::collections::BTreeMap;

use wrenn_model::limits;

use super::AdmissionError;

/// Checks names, values and the total size of an environment.
pub(super) fn check(envs: &BTreeMap<String, String>) -> Result<(), AdmissionError> {
    let mut bytes = 0;
    for (name, value) in envs {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(rejected(format!("{name:?} is not a valid variable name")));
        }
        if value.contains('\0') {
            return Err(rejected(format!(
                "the value of {name:?} contains a NUL character"
            )));
        }
        bytes += name.len() + value.len();
    }
    let max = limits::MAX_SANDBOX_ENVS_BYTES;
    if bytes > max {
        return Err(rejected(format!(
            "{bytes} bytes exceed the limit of {max} bytes"
        )));
    }
    Ok(())
}

/// Returns the environment of a VM that continues from a snapshot. Variables of the request take
/// precedence over those of the snapshot.
pub(super) fn merge(
    of_snapshot: BTreeMap<String, String>,
    of_request: BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let mut envs = of_snapshot;
    envs.extend(of_request);
    envs
}

fn rejected(reason: String) -> AdmissionError {
    AdmissionError::Field {
        field: "envs",
        reason,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_envs() -> impl Strategy<Value = BTreeMap<String, String>> {
        prop::collection::btree_map("[a-c=\0]{0,3}", "[a-c\0]{0,3}", 0..5)
    }

    proptest! {
        #[test]
        fn an_environment_that_the_guest_can_represent_is_admitted(envs in any_envs()) {
            let valid = envs.iter().all(|(name, value)| {
                !name.is_empty() && !name.contains('=') && !format!("{name}{value}").contains('\0')
            });
            prop_assert_eq!(check(&envs).is_ok(), valid);
        }

        #[test]
        fn the_size_is_limited_over_all_variables(
            first in 0..=limits::MAX_SANDBOX_ENVS_BYTES, more in 0..8_usize,
        ) {
            // Two names of one byte, and values that reach the limit up to a few bytes.
            let second = limits::MAX_SANDBOX_ENVS_BYTES - first;
            let lengths = [first.saturating_sub(4), second + more];
            let envs = ["a", "b"].into_iter().zip(lengths);
            let envs: BTreeMap<_, _> =
                envs.map(|(name, len)| (name.to_owned(), "v".repeat(len))).collect();
            let total = 2 + lengths.iter().sum::<usize>();
            prop_assert_eq!(check(&envs).is_ok(), total <= limits::MAX_SANDBOX_ENVS_BYTES);
        }

        #[test]
        fn the_request_takes_precedence(of_snapshot in any_envs(), of_request in any_envs()) {
            let merged = merge(of_snapshot.clone(), of_request.clone());
            for (name, value) in &merged {
                let expected = of_request.get(name).or_else(|| of_snapshot.get(name));
                prop_assert_eq!(Some(value), expected);
            }
            let mut names = of_snapshot.keys().chain(of_request.keys());
            prop_assert!(names.all(|name| merged.contains_key(name)));
        }
    }
}
