//! Decision whether an agent may run sandboxes without limits.
//!
//! | policy     | controllers       | data directory                          | agent           |
//! |------------|-------------------|-----------------------------------------|-----------------|
//! | any        | all               | any                                     | starts          |
//! | `optional` | some are missing  | any                                     | starts, warns   |
//! | `required` | some are missing  | any                                     | does not start  |
//! | `auto`     | some are missing  | new, or has been used with limits       | does not start  |
//! | `auto`     | some are missing  | of an earlier release, never had limits | starts, warns   |
//!
//! The last row exists for upgrades: a host on which an earlier release ran without limits still
//! starts. The file `cgroup-limits` in the data directory records that its sandboxes have had
//! limits.

use std::path::Path;

use crate::limits::CgroupPolicy;

/// File that records that sandboxes of the data directory have had limits.
const MARK: &str = "cgroup-limits";

/// File that every agent has written since hosts have ids, and directory of all releases.
const TRACES: [&str; 2] = ["host-id", "sandboxes"];

/// Reason why an agent does not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PolicyError {
    /// The host lacks controllers.
    #[error(
        "this host has no cgroup controller for {0}, so sandboxes would run without these limits; \
         mount cgroup v2 (`mount -t cgroup2 cgroup2 /sys/fs/cgroup`), or set WRENN_CGROUPS=optional to \
         run sandboxes without them"
    )]
    Missing(String),
}

/// Decides whether an agent of `data_dir` may start on a host that lacks the controllers `missing`.
/// Must be called before the agent writes anything else to the directory.
pub(crate) fn check(
    policy: CgroupPolicy,
    missing: &[&str],
    data_dir: &Path,
) -> Result<(), PolicyError> {
    let mark = data_dir.join(MARK);
    if missing.is_empty() {
        let recorded = mark.exists() || wrenn_durable::replace(&mark, b"", 0o644).is_ok();
        // Without the record, a later loss of the controllers counts as that of an older directory.
        if !recorded {
            tracing::warn!(path = %mark.display(), "failed to record that sandboxes have limits");
        }
        return Ok(());
    }
    let names = missing.join(", ");
    if requires_limits(policy, data_dir) {
        let names = match super::unusable_cgroups().as_slice() {
            [] => names,
            reasons => format!("{names} ({})", reasons.join("; ")),
        };
        return Err(PolicyError::Missing(names));
    }
    tracing::warn!(missing = names, "sandboxes run without these cgroup limits");
    Ok(())
}

/// True if an agent of `data_dir` does not start on a host that lacks a controller.
#[must_use]
pub fn requires_limits(policy: CgroupPolicy, data_dir: &Path) -> bool {
    let has = |name: &str| data_dir.join(name).exists();
    match policy {
        CgroupPolicy::Optional => false,
        CgroupPolicy::Auto => has(MARK) || !TRACES.into_iter().any(has),
        CgroupPolicy::Required => true,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use CgroupPolicy::{Auto, Optional, Required};

    use super::*;

    #[test]
    fn a_new_host_without_controllers_is_refused_unless_the_operator_permits_it() {
        let dir = tempfile::tempdir().unwrap();
        let decide = |policy| check(policy, &["memory", "pids"], dir.path());
        let error = decide(Auto).unwrap_err().to_string();
        for part in ["memory, pids", "mount -t cgroup2", "WRENN_CGROUPS=optional"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(decide(Required).is_err());
        decide(Optional).unwrap();
    }

    #[test]
    fn a_host_that_an_earlier_release_used_without_controllers_still_starts() {
        for trace in TRACES {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(trace), "").unwrap();
            check(Auto, &["memory"], dir.path()).unwrap();
            assert!(check(Required, &["memory"], dir.path()).is_err());
            // Once it had limits, their loss is noticed.
            check(Auto, &[], dir.path()).unwrap();
            assert!(check(Auto, &["memory"], dir.path()).is_err());
            check(Optional, &["memory"], dir.path()).unwrap();
        }
    }

    #[test]
    fn all_controllers_are_enough_for_every_policy() {
        for policy in [Auto, Optional, Required] {
            let dir = tempfile::tempdir().unwrap();
            check(policy, &[], dir.path()).unwrap();
        }
    }
}
