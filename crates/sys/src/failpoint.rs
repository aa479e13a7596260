//! Failpoints: named points in the code at which a process is killed, for crash tests.
//!
//! Environment variable: `WRENN_FAULT=VICTIM@POINT`, where `VICTIM` is `self` or `vmm`. When this
//! process reaches `POINT`, it sends SIGKILL to itself or to its VMM. Builds without debug
//! assertions (release builds) contain no failpoints.

/// Name of the environment variable.
pub const VARIABLE: &str = "WRENN_FAULT";

/// Marks that this process has reached failpoint `point`. `vmm` is the process id of the VMM that
/// this process supervises, if any.
#[cfg(debug_assertions)]
pub fn hit(point: &str, vmm: Option<u32>) {
    use nix::{
        sys::signal::{Signal, kill},
        unistd::{Pid, getpid},
    };

    let Ok(fault) = std::env::var(VARIABLE) else {
        return;
    };
    let Some((victim, at)) = fault.split_once('@') else {
        return;
    };
    if at != point {
        return;
    }
    let pid = match (victim, vmm.map(i32::try_from)) {
        ("self", _) => getpid(),
        ("vmm", Some(Ok(pid))) => Pid::from_raw(pid),
        _ => return,
    };
    let _ = kill(pid, Signal::SIGKILL);
}

/// Does nothing in a release build.
#[cfg(not(debug_assertions))]
pub const fn hit(_point: &str, _vmm: Option<u32>) {}
