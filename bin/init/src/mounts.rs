//! Kernel and in-memory file systems, and the files that programs expect in them.

use std::{ffi::CStr, fs, io, os::unix::fs::symlink};

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const NO_PROGRAMS: MountFlags = PLAIN.union(MountFlags::NOEXEC);

/// Mounts: type, mount point, flags, options. `/dev` is mounted already. `/tmp` is on the disk: it
/// can hold as much as the disk, takes no memory from programs or snapshots, and survives a reboot.
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

/// Links in `/dev` that programs expect and that the kernel does not create: name and target.
const DEVICE_LINKS: [(&str, &str); 4] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// Kernel settings: file and value.
const SETTINGS: [(&str, &str); 7] = [
    // The guest agent watches directories for clients, with one inotify instance per watch.
    ("/proc/sys/fs/inotify/max_user_instances", "2048"),
    ("/proc/sys/fs/inotify/max_user_watches", "1048576"),
    // Same limit as in the guest agent, so that a burst is not lost before it is read.
    ("/proc/sys/fs/inotify/max_queued_events", "65536"),
    // No limit for all processes together, because each process has one. The kernel's own limit is
    // one descriptor per 10 KiB of memory, less than what one process may open here.
    ("/proc/sys/fs/file-max", "9223372036854775807"),
    // Databases and search engines refuse to start with the kernel's own limit of 65530.
    ("/proc/sys/vm/max_map_count", "1048576"),
    // Disabled: proactive compaction looks for pages to move twice per second, without benefit
    // here.
    ("/proc/sys/vm/compaction_proactiveness", "0"),
    (
        "/sys/fs/cgroup/cgroup.subtree_control",
        "+cpu +memory +io +pids",
    ),
];

/// Mounts the file systems, then creates the links and writes the settings. Tries all of them and
/// returns the first mount error.
pub(crate) fn mount_all() -> io::Result<()> {
    let mut outcome = Ok(());
    for (kind, place, flags, options) in MOUNTS {
        let _ = fs::create_dir(place);
        if let Err(error) = mount(kind, place, kind, flags, options) {
            // A kernel without an initramfs has mounted /dev itself, and perhaps others.
            let error = io::Error::other(format!("{place}: {error}"));
            outcome = outcome.and(Err(error));
        }
    }
    // As on other Linux systems: containers can share mounts with the guest.
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    if let Err(error) = mount_change("/", shared) {
        outcome = outcome.and(Err(error.into()));
    }
    for (name, target) in DEVICE_LINKS {
        let _ = symlink(target, format!("/dev/{name}"));
    }
    for (path, value) in SETTINGS {
        let _ = fs::write(path, value);
    }
    outcome
}
