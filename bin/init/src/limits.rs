//! Resource limits of all programs in the guest.

use std::io;

use rustix::process::{Resource, Rlimit, setrlimit};

/// Open descriptors per process: soft limit and hard limit. The kernel's own soft limit of 1024 is
/// too low for databases, language servers and builds. The hard limit is the largest that the
/// kernel permits (`fs.nr_open`).
const OPEN_FILES: (u64, u64) = (65_536, 1_048_576);

/// Sets the limits of this process, which all programs inherit.
pub(crate) fn set() -> io::Result<()> {
    let (soft, hard) = OPEN_FILES;
    let limit = Rlimit {
        current: Some(soft),
        maximum: Some(hard),
    };
    Ok(setrlimit(Resource::Nofile, limit)?)
}
