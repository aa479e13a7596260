//! How many files a service may have open: some for each sandbox and each client, and a login shell's limit is 1024.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// As many as the unit file gives it.
const WANTED: u64 = 65_536;

/// Raises this process's limit as far as it may. Where it may not, the limit stays.
pub(crate) fn raise() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(WANTED, |maximum| maximum.min(WANTED));
    if current.is_none_or(|current| current >= wanted) {
        return;
    }
    let raised = Rlimit {
        current: Some(wanted),
        maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_low_limit_is_raised_and_a_high_one_is_left() {
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        let low = Rlimit {
            current: Some(256),
            maximum,
        };
        setrlimit(Resource::Nofile, low).expect("lowered");
        raise();
        let current = getrlimit(Resource::Nofile).current;
        assert_eq!(current, Some(maximum.unwrap_or(WANTED).min(WANTED)));
        raise();
        assert_eq!(getrlimit(Resource::Nofile).current, current);
    }
}
