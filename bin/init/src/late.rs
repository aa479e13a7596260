//! Work that can wait until the guest agent serves requests: drivers that no request needs, the
//! size of the disk, time.
//!
//! A child process does this work, because the work would compete with the guest agent's start for
//! the CPU. The child runs at the lowest priority. When it is done, it writes [`SETTLED`], so that
//! the creator of a guest's first snapshot can wait for it.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::process::{Pid, setpriority_process};
use wrenn_proto::guest::{ENVD_PORT, SETTLED};

use crate::{ENVIRONMENT, LATE, drivers};

/// Maximum time to wait for the guest agent, and then for chronyd.
const DEADLINE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);

/// Starts the child process.
pub(crate) fn start() -> io::Result<()> {
    Command::new("/proc/self/exe")
        .arg0(LATE)
        .env_clear()
        .envs(ENVIRONMENT)
        .stdin(Stdio::null())
        .spawn()
        .map(drop)
}

/// Runs the child process.
pub(crate) fn run() {
    let _ = setpriority_process(None, 19);
    let agent = SocketAddr::from((Ipv4Addr::LOCALHOST, ENVD_PORT));
    until(|| TcpStream::connect(agent).is_ok());
    load_drivers();
    grow_file_system();
    start_chronyd();
    let _ = fs::write(SETTLED, "");
}

fn until(mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() && begun.elapsed() < DEADLINE {
        sleep(PAUSE);
    }
}

/// Loads the drivers that the image lists. A driver whose device the machine does not have is
/// skipped.
fn load_drivers() {
    let names = drivers::listed();
    if names.is_empty() {
        return;
    }
    let mut modprobe = quiet("modprobe");
    modprobe.args(["--all", "--use-blacklist", "--quiet", "--"]);
    let _ = modprobe.args(names).status();
}

/// Grows the file system to the size of the disk, which may be larger than the image.
fn grow_file_system() {
    let number = |path: &str| -> Option<u64> { fs::read_to_string(path).ok()?.trim().parse().ok() };
    let disk = number("/sys/block/vda/size").unwrap_or(0);
    if disk > number("/etc/wrenn-disk-sectors").unwrap_or(u64::MAX) {
        let _ = quiet("resize2fs").arg("/dev/vda").status();
    }
}

/// Starts chronyd. Time comes from the host's clock if the machine provides one, else from the
/// gateway.
fn start_chronyd() {
    let has_clock = Path::new("/dev/ptp0").exists();
    let config = if has_clock { "ptp" } else { "gateway" };
    let _ = fs::create_dir("/run/chrony");
    let chronyd = quiet("chronyd")
        .args(["-n", "-f", &format!("/etc/chrony/wrenn-{config}.conf")])
        .spawn();
    let Ok(mut chronyd) = chronyd else { return };
    // chronyd writes this file when it is ready.
    until(|| {
        Path::new("/run/chrony/chronyd.pid").exists() || !matches!(chronyd.try_wait(), Ok(None))
    });
    let pid = i32::try_from(chronyd.id()).ok().and_then(Pid::from_raw);
    let _ = setpriority_process(pid, 0);
}

fn quiet(program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}
