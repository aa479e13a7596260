//! Guest without a virtual machine: a network namespace behind a sandbox's TAP device, with the
//! guest's addresses.
//!
//! Frames are passed between that TAP device and one of the guest's own. Everything between the two
//! is therefore the same as with a real guest: routes, address translation, filters.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    path::Path,
    process::Command,
};

use nix::sched::{CloneFlags, setns, unshare};
use wrenn_proto::guest::{GATEWAY_IP, IP as GUEST_IP, MAC as GUEST_MAC, TAP_NAME};

/// Makes the calling thread the guest of the sandbox with the namespace `netns`. Traffic of this
/// thread, and of threads and processes that it starts, comes from the guest from now on. Frames
/// pass until the process ends.
pub(crate) fn become_guest(netns: &Path) -> io::Result<()> {
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
