//! What can wait until the guest agent serves: drivers that no request needs, the size of the disk, time.
//!
//! Done by a child, as the guest agent's start would compete with it for the CPU. It is the least urgent of all until it is
//! done; then it writes [`SETTLED`], so that whoever freezes the first moment of a guest can wait for that.

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
use wrenn_proto::limits::{ENVD_PORT, SETTLED};

use crate::{ENVIRONMENT, LATE, drivers};

/// How long the guest agent, and then chronyd, are waited for.
const DEADLINE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);

/// Starts the child.
pub(crate) fn start() -> io::Result<()> {
    Command::new("/proc/self/exe")
        .arg0(LATE)
        .env_clear()
        .envs(ENVIRONMENT)
        .stdin(Stdio::null())
        .spawn()
        .map(drop)
}

/// The child.
pub(crate) fn run() {
    let _ = setpriority_process(None, 19);
    let agent = SocketAddr::from((Ipv4Addr::LOCALHOST, ENVD_PORT));
    until(|| TcpStream::connect(agent).is_ok());
    drivers::load_late();
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

/// The disk may be larger than the image was made.
fn grow_file_system() {
    let number = |path: &str| -> Option<u64> { fs::read_to_string(path).ok()?.trim().parse().ok() };
    let disk = number("/sys/block/vda/size").unwrap_or(0);
    if disk > number("/etc/wrenn-disk-sectors").unwrap_or(u64::MAX) {
        let _ = quiet("resize2fs").arg("/dev/vda").status();
    }
}

/// Time from the host's clock where the machine shows it, else from the gateway.
fn start_chronyd() {
    let has_clock = Path::new("/dev/ptp0").exists();
    let config = if has_clock { "ptp" } else { "gateway" };
    let _ = fs::create_dir("/run/chrony");
    let chronyd = quiet("chronyd")
        .args(["-n", "-f", &format!("/etc/chrony/wrenn-{config}.conf")])
        .spawn();
    let Ok(mut chronyd) = chronyd else { return };
    // Written when it is ready.
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
