//! Named points at which a process dies, for tests of what is left then.
//!
//! `WRENN_FAULT=VICTIM@POINT`, where `VICTIM` is `self` or `vmm`, kills this process or its VMM with SIGKILL when it comes to
//! `POINT`. A build without debug assertions (a release) has no such points at all.

/// Name of the environment variable.
pub const VARIABLE: &str = "WRENN_FAULT";

/// This process has come to `point`; `vmm` is the process id of the VMM that it supervises, if it does.
#[cfg(debug_assertions)]
pub fn point(point: &str, vmm: Option<u32>) {
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

/// Nothing happens in a release.
#[cfg(not(debug_assertions))]
pub const fn point(_point: &str, _vmm: Option<u32>) {}
