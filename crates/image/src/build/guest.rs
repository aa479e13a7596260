//! Files that Wrenn adds to the guest, beside the guest agent.

/// First program of the kernel, in the initramfs.
pub(crate) const INITRAMFS_INIT: &str = include_str!("../../guest/initramfs-init");

/// A file of the guest.
pub(crate) struct GuestFile {
    pub(crate) path: &'static str,
    pub(crate) mode: u32,
    pub(crate) content: &'static str,
}

/// Files of the root file system. An entry with empty content empties the file.
pub(crate) const FILES: [GuestFile; 10] = [
    GuestFile {
        path: "etc/fstab",
        mode: 0o644,
        content: include_str!("../../guest/fstab"),
    },
    GuestFile {
        path: "usr/local/bin/wrenn-init",
        mode: 0o755,
        content: include_str!("../../guest/wrenn-init"),
    },
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
        path: "usr/local/share/wrenn/etc/hostname",
        mode: 0o644,
        content: "sandbox\n",
    },
    GuestFile {
        path: "usr/local/share/wrenn/etc/hosts",
        mode: 0o644,
        content: "127.0.0.1 localhost sandbox\n::1 localhost ip6-localhost\n",
    },
    // Nameservers are given to a sandbox when it may use them.
    GuestFile {
        path: "usr/local/share/wrenn/etc/resolv.conf",
        mode: 0o644,
        content: "",
    },
    // Filled by each sandbox with its own.
    GuestFile {
        path: "usr/local/share/wrenn/etc/machine-id",
        mode: 0o644,
        content: "",
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
/// before it is reported running, and writing to a file system on a disk takes ten times as long.
pub(crate) const IDENTITY: [&str; 4] = ["hostname", "hosts", "resolv.conf", "machine-id"];

/// Links of `/dev` that programs expect and no kernel makes: name and target.
pub(crate) const DEVICE_LINKS: [(&str, &str); 4] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

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
    let links = DEVICE_LINKS.iter().flat_map(|(name, to)| [*name, *to]);
    files
        .chain(users)
        .chain(links)
        .chain(REMOVED)
        .chain(IDENTITY)
        .map(str::as_bytes)
}
