//! First program of the guest's kernel, and its init until tini takes over.
//!
//! One static program that starts no other: a shell script that does the same starts some twenty, and each costs the better
//! part of 20 ms where the CPU is emulated. It lies in the initramfs and goes on from there in the root file system, without
//! being loaded again; a kernel that mounts its root by itself finds it at `/usr/local/bin/wrenn-init`.
//!
//! ```text
//!   kernel ─► drivers ─► disk, new root ─► mounts, identity, network ─► exec tini ─► envd
//!             (only in the initramfs)                  └─► "late", a child: waits for envd, then other drivers, time, disk size
//! ```
//!
//! Owns the guest until tini is process 1. What fails after the root is mounted is told on the console and tolerated: a guest
//! without, say, a clock is better than none. Without a root it ends, which ends the kernel, and the host sees that.
#![forbid(unsafe_code)]

mod console;
mod drivers;
mod identity;
mod late;
mod mounts;
mod network;
mod root;

use std::{os::unix::process::CommandExt as _, path::Path, process::Command};

use wrenn_proto::supervise::marks;

use console::{report, say};

/// Name by which the program calls itself for what can wait.
const LATE: &str = "wrenn-init-late";

/// Where packages put the two kinds of tini. The static one need not load libraries.
const TINI: [&str; 2] = ["/usr/bin/tini-static", "/usr/bin/tini"];

/// Environment of everything in the guest.
const ENVIRONMENT: [(&str, &str); 3] = [
    (
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ),
    ("HOME", "/root"),
    ("LANG", "C.UTF-8"),
];

fn main() {
    if std::env::args_os().next().is_some_and(|name| name == LATE) {
        return late::run();
    }
    let mut kept = root::Kept::new();
    if Path::new(drivers::LIST).exists() {
        say(marks::KERNEL_DONE);
        drivers::load_early();
        kept = match root::enter() {
            Ok(kept) => kept,
            Err(error) => return say(&format!("wrenn: no root file system: {error}")),
        };
    }
    report("mount the file systems", mounts::mount_all());
    report("keep drivers for later", drivers::keep_late(&kept));
    report("write the machine's identity", identity::write());
    report("set up the network", network::configure());
    report("prepare what can wait", late::start());
    say(marks::INIT_DONE);
    let error = hand_over();
    say(&format!("wrenn: tini was not started: {error}"));
}

/// Becomes tini, with the guest agent below it. Returns only if that fails.
fn hand_over() -> std::io::Error {
    let tini = TINI.into_iter().find(|path| Path::new(path).exists());
    Command::new(tini.unwrap_or(TINI[1]))
        .args(["--", "/usr/local/bin/envd"])
        .env_clear()
        .envs(ENVIRONMENT)
        .exec()
}
