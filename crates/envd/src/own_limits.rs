//! The agent's own limits: it holds the pipes of all its processes, and must be the last to die when memory runs out.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors that the agent may have open: four a process, and some for files and connections.
const OPEN_FILES: u64 = 65_536;

/// Killed after everything that was started through it; those have 100.
const OOM_SCORE_ADJ: &str = "-900";

/// Raises the agent's limits. Returns those of descriptors that its processes are to have: the soft one that it was started
/// with (programs that use `select(2)` break above 1024) and the raised hard one; `None` if nothing was changed.
#[must_use]
pub fn raise() -> Option<(u64, u64)> {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ) {
        tracing::info!(%error, "the agent may be killed when memory runs out");
    }
    let before = getrlimit(Resource::Nofile);
    // None is no limit.
    let (soft, hard) = (before.current?, before.maximum.unwrap_or(u64::MAX));
    if soft >= OPEN_FILES {
        return None;
    }
    let raised = hard.max(OPEN_FILES);
    let limit = |hard| Rlimit {
        current: Some(OPEN_FILES.min(hard)),
        maximum: Some(hard),
    };
    if setrlimit(Resource::Nofile, limit(raised)).is_ok() {
        return Some((soft, raised));
    }
    // Without the right to raise the hard limit, as far as that goes.
    let problem = setrlimit(Resource::Nofile, limit(hard)).err();
    if let Some(error) = problem {
        tracing::warn!(%error, "the agent can hold few processes at once");
        return None;
    }
    Some((soft, hard))
}
