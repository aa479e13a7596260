//! Resource limits of envd itself. envd holds the pipes of all its processes and must be the last
//! process to be killed when memory runs out.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Maximum number of open descriptors of envd: four per process, plus files and connections.
const OPEN_FILES: u64 = 65_536;

/// OOM score adjustment of envd. Processes that were started through envd have 100 and are killed
/// first.
const OOM_SCORE_ADJ: &str = "-900";

/// Raises envd's limits. Returns the soft and the hard descriptor limit for envd's child processes:
/// the soft limit with which envd was started (programs that use `select(2)` break above 1024) and
/// the raised hard limit. Returns `None` if nothing was changed.
#[must_use]
pub fn raise() -> Option<(u64, u64)> {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ) {
        tracing::info!(%error, "failed to lower the OOM score of envd");
    }
    let before = getrlimit(Resource::Nofile);
    // `None` means no limit.
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
    // Without the privilege to raise the hard limit, raise the soft limit as far as possible.
    let problem = setrlimit(Resource::Nofile, limit(hard)).err();
    if let Some(error) = problem {
        tracing::warn!(%error, "failed to raise the descriptor limit, few processes can run");
        return None;
    }
    Some((soft, hard))
}
