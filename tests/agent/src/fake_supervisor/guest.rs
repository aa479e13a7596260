//! Guest without a virtual machine: a thread with namespaces of its own.
//!
//! | part of the guest | what the thread has |
//! |---|---|
//! | network | a network namespace behind the sandbox's TAP device, with the guest's addresses |
//! | `/etc`, `/run` | copies, because the guest agent writes the guest's identity to them |
//! | host name | a UTS namespace |
//! | disks, page cache, clock | none: system calls that would change those of the host do nothing |
//!
//! Frames are passed between the TAP device and one of the guest's own. Everything between the two
//! is therefore the same as with a real guest: routes, address translation, filters.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::Path,
    process::Command,
};

use nix::{
    libc,
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use wrenn_proto::guest::{GATEWAY_IP, IP as GUEST_IP, MAC as GUEST_MAC, TAP_NAME};

/// Users of the guest. The default user of the template is root, because tests change the guest's
/// network.
const USERS: &str = "root:x:0:0::/root:/bin/sh\nuser:x:0:0::/root:/bin/sh\n";

/// Makes the calling thread the guest of the sandbox with the namespace `netns`. This thread, and
/// threads and processes that it starts from now on, are in the guest. Frames pass until the
/// process ends.
///
/// The thread must be the main thread: `/proc/net` shows the main thread's network.
pub(crate) fn become_guest(netns: &Path) -> io::Result<()> {
    enter_network(netns)?;
    enter_files()?;
    spare_host().map_err(io::Error::other)
}

fn enter_network(netns: &Path) -> io::Result<()> {
    let outside = open_sandbox_tap(netns)?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    let inside = File::from(wrenn_sys::tap::open("eth0")?);
    for command in [
        "link set lo up".to_owned(),
        format!("link set eth0 address {GUEST_MAC} up"),
        format!("addr add {GUEST_IP}/30 dev eth0"),
        format!("route add default via {GATEWAY_IP}"),
    ] {
        let status = Command::new("ip").args(command.split(' ')).status()?;
        if !status.success() {
            return Err(io::Error::other(format!("ip {command}: {status}")));
        }
    }
    pass(outside.try_clone()?, inside.try_clone()?);
    pass(inside, outside);
    Ok(())
}

/// Opens the existing TAP device in its namespace, as the supervisor does.
fn open_sandbox_tap(netns: &Path) -> io::Result<File> {
    let netns = File::open(netns)?;
    let open = move || {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        wrenn_sys::tap::open(TAP_NAME).map(File::from)
    };
    std::thread::spawn(open)
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("panicked")))
}

fn pass(mut from: File, mut to: File) {
    std::thread::spawn(move || {
        let mut frame = vec![0; 128 * 1024];
        while let Ok(length @ 1..) = from.read(&mut frame) {
            // A link that is down rejects frames, just as a cable would lose them.
            let _ = to.write(&frame[..length]);
        }
    });
}

/// Mounts an empty `/run`, and an `/etc` whose changes stay in it.
fn enter_files() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
    let empty = MsFlags::empty();
    mount(Some("tmpfs"), "/run", Some("tmpfs"), empty, None::<&str>)?;
    fs::create_dir("/run/etc-changes")?;
    fs::create_dir("/run/etc-work")?;
    let layers = "lowerdir=/etc,upperdir=/run/etc-changes,workdir=/run/etc-work";
    mount(
        Some("overlay"),
        "/etc",
        Some("overlay"),
        empty,
        Some(layers),
    )?;
    fs::write("/etc/passwd", USERS)?;
    // A plain file, so that a snapshot does not drop the host's page cache.
    let (file, kernel) = ("/run/drop-caches", "/proc/sys/vm/drop_caches");
    fs::write(file, "")?;
    mount(
        Some(file),
        kernel,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )?;
    Ok(())
}

/// Turns `sync` and `clock_settime` into successes without an effect. A flush of all the host's
/// disks before each snapshot would take seconds on a busy host.
fn spare_host() -> Result<(), seccompiler::Error> {
    let calls = [libc::SYS_sync, libc::SYS_clock_settime];
    let filter = SeccompFilter::new(
        BTreeMap::from(calls.map(|call| (call, vec![]))),
        SeccompAction::Allow,
        SeccompAction::Errno(0),
        std::env::consts::ARCH.try_into()?,
    )?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program)
}
