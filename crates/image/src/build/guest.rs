//! Files, programs and users that Wrenn adds to the guest.

/// Wrenn's programs for the guest.
#[derive(Debug)]
pub(crate) struct Programs {
    /// Content of the guest agent.
    pub(crate) envd: Vec<u8>,
    /// Content of the kernel's first program, which is in the initramfs and in the root file
    /// system.
    pub(crate) init: Vec<u8>,
}

/// File in the guest.
pub(crate) struct GuestFile {
    pub(crate) path: &'static str,
    pub(crate) mode: u32,
    pub(crate) content: &'static str,
}

/// Files of the root file system. An entry with empty content empties the file.
pub(crate) const FILES: [GuestFile; 11] = [
    GuestFile {
        path: "etc/chrony/wrenn-ptp.conf",
        mode: 0o644,
        content: include_str!("../../guest/chrony-ptp.conf"),
    },
    GuestFile {
        path: "etc/chrony/wrenn-gateway.conf",
        mode: 0o644,
        content: include_str!("../../guest/chrony-gateway.conf"),
    },
    GuestFile {
        path: "etc/sudoers.d/user",
        mode: 0o440,
        content: "user ALL=(ALL) NOPASSWD: ALL\n",
    },
    GuestFile {
        path: "etc/sudoers.d/wrenn-user",
        mode: 0o440,
        content: "wrenn-user ALL=(ALL) NOPASSWD: ALL\n",
    },
    GuestFile {
        path: "etc/fstab",
        mode: 0o644,
        content: include_str!("../../guest/fstab"),
    },
    GuestFile {
        path: "etc/security/limits.d/wrenn.conf",
        mode: 0o644,
        content: include_str!("../../guest/limits.conf"),
    },
    GuestFile {
        path: "etc/modules-load.d/wrenn.conf",
        mode: 0o644,
        content: include_str!("../../guest/modules.conf"),
    },
    GuestFile {
        path: "etc/profile.d/wrenn-path.sh",
        mode: 0o644,
        content: include_str!("../../guest/path.sh"),
    },
    GuestFile {
        path: "usr/lib/tmpfiles.d/wrenn.conf",
        mode: 0o644,
        content: include_str!("../../guest/tmpfiles.conf"),
    },
    GuestFile {
        path: "usr/local/bin/systemctl",
        mode: 0o755,
        content: include_str!("../../guest/systemctl"),
    },
    // The package's own configuration references a pool of servers.
    GuestFile {
        path: "etc/chrony/chrony.conf",
        mode: 0o644,
        content: include_str!("../../guest/chrony-gateway.conf"),
    },
];

/// Files of `/etc` that identify a machine. They are links into `/run/wrenn/etc`, which is in
/// memory: a restored guest writes these files before it is reported as running, and writing to a
/// file system on a disk takes ten times as long. `wrenn-init` creates the targets.
pub(crate) const IDENTITY: [&str; 4] = ["hostname", "hosts", "resolv.conf", "machine-id"];

/// Paths that are removed from the image: caches, logs, and settings that make a guest contact
/// servers.
pub(crate) const REMOVED: [&str; 7] = [
    "etc/chrony/conf.d",
    "etc/chrony/sources.d",
    "etc/dhcp",
    "etc/cron.daily",
    "var/lib/apt/lists",
    "var/cache/apt",
    "var/log",
];

/// The users of sandboxes besides root: lines of `passwd(5)`, `group(5)` and `shadow(5)`.
pub(crate) const USER_LINES: [(&str, &str); 6] = [
    ("etc/passwd", "user:x:1000:1000::/home/user:/bin/bash\n"),
    ("etc/group", "user:x:1000:\n"),
    ("etc/shadow", "user:*:19000:0:99999:7:::\n"),
    (
        "etc/passwd",
        "wrenn-user:x:1001:1001::/home/wrenn-user:/bin/bash\n",
    ),
    ("etc/group", "wrenn-user:x:1001:\n"),
    ("etc/shadow", "wrenn-user:*:19000:0:99999:7:::\n"),
];

/// Home directories of these users, each with the id of its user and group.
pub(crate) const HOMES: [(&str, u32); 2] = [("home/user", 1000), ("home/wrenn-user", 1001)];

/// Returns everything in this file that is part of the key of a root file system.
pub(crate) fn all_contents() -> impl Iterator<Item = &'static [u8]> {
    let files = FILES.iter().flat_map(|file| [file.path, file.content]);
    let users = USER_LINES.iter().flat_map(|(path, line)| [*path, *line]);
    files
        .chain(users)
        .chain(REMOVED)
        .chain(IDENTITY)
        .map(str::as_bytes)
}
