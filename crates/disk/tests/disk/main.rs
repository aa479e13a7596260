//! Tests with the programs of QEMU, which run in jails. They require root.
#![allow(clippy::unwrap_used, reason = "tests")]

mod chain;
mod export;
mod export_faults;
mod export_switch;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// Runs a test in a network and a mount namespace of its own.
fn on_private_host(test: impl AsyncFnOnce() + Send) {
    let run = || {
        wrenn_test_host::enter();
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test());
    };
    std::thread::scope(|threads| {
        let ended = threads.spawn(run).join();
        if let Err(panic) = ended {
            std::panic::resume_unwind(panic);
        }
    });
}

/// True if a file system is mounted at or below a path.
fn is_mounted(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    mounts.contains(path.to_str().unwrap())
}

/// True if a process exists and is no zombie.
fn is_running(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// Waits until a condition is true, for at most 10 s.
fn wait_until(mut is_true: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is_true() {
        assert!(Instant::now() < end, "timed out");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn signal(pid: u32, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(pid.try_into().unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}
