//! First program of the guest's kernel, and the guest's init until tini takes over.
//!
//! `wrenn-init` is one static program that starts one other program, `systemd-tmpfiles`. A shell
//! script for the same work starts about twenty programs, and each start costs almost 20 ms where
//! the CPU is emulated. The program is in the initramfs and continues from there in the root file
//! system without being loaded again. A kernel that mounts its root by itself finds the program at
//! `/usr/local/bin/wrenn-init`.
//!
//! ```text
//!   kernel ─► drivers ─► disk, new root ─► mounts, devices, limits, ─┬─► exec tini ─► envd
//!             (only in the initramfs)      identity, network, /run   └─► child "late"
//! ```
//!
//! The child "late" waits for envd. It then loads the other drivers, grows the file system to the
//! disk size and starts the time service.
//!
//! All other drivers are in `/lib/modules`. The kernel starts `modprobe` when a program needs one.
//! Decision record 0020 contains the reasons.
//!
//! Owns the guest until tini is process 1. A failure after the root is mounted is printed on the
//! console and tolerated: a guest without a clock, for example, is better than no guest. Without a
//! root, the program exits. The exit stops the kernel, and the host detects that.
#![forbid(unsafe_code)]

mod console;
mod devices;
mod drivers;
mod identity;
mod late;
mod limits;
mod mounts;
mod network;
mod root;
mod run_files;
mod timer;

use std::{os::unix::process::CommandExt as _, path::Path, process::Command};

use wrenn_proto::supervise::marks;

use console::{report, say};

/// Program name (`argv[0]`) of the child that does the late work.
const LATE: &str = "wrenn-init-late";

/// Paths at which packages install the two variants of tini. The static variant loads no libraries.
const TINI: [&str; 2] = ["/usr/bin/tini-static", "/usr/bin/tini"];

/// Environment of all programs in the guest.
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
    if Path::new(drivers::LIST).exists() {
        say(marks::KERNEL_DONE);
        if let Err(reason) = timer::check() {
            say(&format!("{}{reason}", marks::BOOT_FAILED));
            wait_to_be_ended();
        }
        drivers::load_early();
        if let Err(error) = root::enter() {
            return say(&format!("wrenn: failed to mount root: {error}"));
        }
    }
    report("mount the file systems", mounts::mount_all());
    report("create the device nodes", devices::create());
    report("set the limits", limits::set());
    report("write the guest's identity", identity::write());
    report("set up the network", network::configure());
    report("create the files in /run", run_files::create());
    report("start the late setup", late::start());
    say(marks::INIT_DONE);
    let error = hand_over();
    say(&format!("wrenn: failed to start tini: {error}"));
}

/// Waits for the host to end the guest: without a timer nothing else works, and an exit would be
/// reported as a crash.
fn wait_to_be_ended() -> ! {
    loop {
        std::thread::park();
    }
}

/// Executes tini, with the guest agent as its child. Returns only on failure.
fn hand_over() -> std::io::Error {
    let tini = TINI.into_iter().find(|path| Path::new(path).exists());
    Command::new(tini.unwrap_or(TINI[1]))
        .args(["--", "/usr/local/bin/envd"])
        .env_clear()
        .envs(ENVIRONMENT)
        .exec()
}
