//! Limit of open files of a service. A service needs several per sandbox and per client, and the
//! limit of a login shell is 1024.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Target limit, the same as in the unit file.
const DESIRED: u64 = 65_536;

/// Raises this process's limit as far as permitted. If raising fails, the limit is unchanged.
pub(crate) fn raise() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(DESIRED, |maximum| maximum.min(DESIRED));
    if current.is_none_or(|current| current >= wanted) {
        return;
    }
    let raised = Rlimit {
        current: Some(wanted),
        maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "failed to raise the open file limit");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_limit_is_raised_and_a_high_one_is_kept() {
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        let low = Rlimit {
            current: Some(256),
            maximum,
        };
        setrlimit(Resource::Nofile, low).expect("lowered");
        raise();
        let current = getrlimit(Resource::Nofile).current;
        assert_eq!(current, Some(maximum.unwrap_or(DESIRED).min(DESIRED)));
        raise();
        assert_eq!(getrlimit(Resource::Nofile).current, current);
    }
}
