//! What Wrenn adds to the guest.

/// Our programs.
#[derive(Debug)]
pub(crate) struct Programs {
    /// The guest agent.
    pub(crate) envd: Vec<u8>,
    /// The kernel's first program, in the initramfs and in the root file system.
    pub(crate) init: Vec<u8>,
}

/// A file of the guest.
pub(crate) struct GuestFile {
    pub(crate) path: &'static str,
    pub(crate) mode: u32,
    pub(crate) content: &'static str,
}

/// Files of the root file system. An entry with empty content empties the file.
pub(crate) const FILES: [GuestFile; 4] = [
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
    // Chrony's own configuration names a pool of servers.
    GuestFile {
        path: "etc/chrony/chrony.conf",
        mode: 0o644,
        content: include_str!("../../guest/chrony-gateway.conf"),
    },
];

/// Files of `/etc` that tell who a machine is: links to `/run/wrenn/etc`, which lies in memory. A restored guest writes them
/// before it is reported running, and writing to a file system on a disk takes ten times as long. `wrenn-init` makes them.
pub(crate) const IDENTITY: [&str; 4] = ["hostname", "hosts", "resolv.conf", "machine-id"];

/// What is not for guests: caches, logs, and settings that contact somebody.
pub(crate) const REMOVED: [&str; 7] = [
    "etc/chrony/conf.d",
    "etc/chrony/sources.d",
    "etc/dhcp",
    "etc/cron.daily",
    "var/lib/apt/lists",
    "var/cache/apt",
    "var/log",
];

/// The user of sandboxes, beside root: `passwd(5)`, `group(5)`, `shadow(5)`.
pub(crate) const USER_LINES: [(&str, &str); 3] = [
    ("etc/passwd", "user:x:1000:1000::/home/user:/bin/bash\n"),
    ("etc/group", "user:x:1000:\n"),
    ("etc/shadow", "user:*:19000:0:99999:7:::\n"),
];

/// All that goes into the key of a root file system.
pub(crate) fn all_contents() -> impl Iterator<Item = &'static [u8]> {
    let files = FILES.iter().flat_map(|file| [file.path, file.content]);
    let users = USER_LINES.iter().flat_map(|(path, line)| [*path, *line]);
    files
        .chain(users)
        .chain(REMOVED)
        .chain(IDENTITY)
        .map(str::as_bytes)
}
