//! File systems of the kernel's and in memory, and what programs expect in them.

use std::{ffi::CStr, fs, io, os::unix::fs::symlink};

use rustix::mount::{MountFlags, mount};

const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const NO_PROGRAMS: MountFlags = PLAIN.union(MountFlags::NOEXEC);

/// Type, place, flags, options. `/dev` is there already; `/tmp` is on the disk, so that it holds what the disk holds, takes no memory
/// from programs and from every snapshot, and survives a boot.
const MOUNTS: [(&str, &str, MountFlags, &CStr); 6] = [
    ("proc", "/proc", NO_PROGRAMS, c""),
    ("sysfs", "/sys", NO_PROGRAMS, c""),
    (
        "devpts",
        "/dev/pts",
        MountFlags::NOSUID.union(MountFlags::NOEXEC),
        c"gid=5,mode=620,ptmxmode=666",
    ),
    ("tmpfs", "/dev/shm", PLAIN, c"mode=1777"),
    ("tmpfs", "/run", PLAIN, c"mode=755"),
    ("cgroup2", "/sys/fs/cgroup", NO_PROGRAMS, c""),
];

/// Links of `/dev` that programs expect and no kernel makes: name and target.
const DEVICE_LINKS: [(&str, &str); 4] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// Settings of the kernel: file and value.
const SETTINGS: [(&str, &str); 5] = [
    // The guest agent watches directories for clients, an instance each.
    ("/proc/sys/fs/inotify/max_user_instances", "2048"),
    ("/proc/sys/fs/inotify/max_user_watches", "1048576"),
    // As many as the agent keeps: a burst is not lost before it is read.
    ("/proc/sys/fs/inotify/max_queued_events", "65536"),
    // Looks for something to move twice a second, for nobody.
    ("/proc/sys/vm/compaction_proactiveness", "0"),
    (
        "/sys/fs/cgroup/cgroup.subtree_control",
        "+cpu +memory +io +pids",
    ),
];

/// Mounts all, then makes links and settings. Everything is tried; the first failure is told.
pub(crate) fn mount_all() -> io::Result<()> {
    let mut outcome = Ok(());
    for (kind, place, flags, options) in MOUNTS {
        let _ = fs::create_dir(place);
        if let Err(error) = mount(kind, place, kind, flags, options) {
            // A kernel without an initramfs has mounted /dev itself, and perhaps more.
            let error = io::Error::other(format!("{place}: {error}"));
            outcome = outcome.and(Err(error));
        }
    }
    for (name, target) in DEVICE_LINKS {
        let _ = symlink(target, format!("/dev/{name}"));
    }
    for (path, value) in SETTINGS {
        let _ = fs::write(path, value);
    }
    outcome
}
