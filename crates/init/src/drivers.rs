//! Kernel modules of the initramfs, each behind what it needs.
//!
//! `/modules` lists them, a line each: file name in `/lib/modules`. An empty line ends those that the machine needs to find its
//! disk and network; the others are loaded once the guest agent serves.

use std::{fs, io};

use rustix::{fd::AsFd as _, system::finit_module};

/// The list. Whether it exists tells whether this is the initramfs.
pub(crate) const LIST: &str = "/modules";

/// Where the modules are in the initramfs.
pub(crate) const DIR: &str = "/lib/modules";

/// Where [`load_late`] finds the modules once the root has changed: in memory, until it has loaded them.
pub(crate) const LATE_DIR: &str = "/run/wrenn-modules";

/// Loads what the machine needs to find its disk and network. Some are for other machines: what matters is that the disk appears.
pub(crate) fn load_early() {
    for name in names().0 {
        let _ = load(DIR, &name);
    }
}

/// Names of the modules that come first, and of those that can wait.
pub(crate) fn names() -> (Vec<String>, Vec<String>) {
    split(&fs::read_to_string(LIST).unwrap_or_default())
}

fn split(list: &str) -> (Vec<String>, Vec<String>) {
    let (early, late) = list.split_once("\n\n").unwrap_or((list, ""));
    let names = |part: &str| part.lines().map(str::to_owned).collect();
    (names(early), names(late))
}

/// Loads what could wait, and forgets it.
pub(crate) fn load_late() {
    let Ok(order) = fs::read_to_string(format!("{LATE_DIR}/order")) else {
        return;
    };
    for name in order.lines() {
        let _ = load(LATE_DIR, name);
    }
    let _ = fs::remove_dir_all(LATE_DIR);
}

/// Keeps what can wait in `/run` of the new root, which is mounted there.
pub(crate) fn keep_late(files: &[(String, Vec<u8>)]) -> io::Result<()> {
    fs::create_dir(LATE_DIR)?;
    let mut order = String::new();
    for (name, content) in files {
        fs::write(format!("{LATE_DIR}/{name}"), content)?;
        order.push_str(name);
        order.push('\n');
    }
    fs::write(format!("{LATE_DIR}/order"), order)
}

fn load(dir: &str, name: &str) -> io::Result<()> {
    let file = fs::File::open(format!("{dir}/{name}"))?;
    Ok(finit_module(file.as_fd(), c"", 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_line_divides_the_list() {
        let (early, late) = split("virtio.ko\nvirtio_blk.ko\n\nvirtio_rng.ko\n");
        assert_eq!(early, ["virtio.ko", "virtio_blk.ko"]);
        assert_eq!(late, ["virtio_rng.ko"]);
        let (early, late) = split("virtio.ko\n");
        assert_eq!(early, ["virtio.ko"]);
        assert!(late.is_empty());
        assert!(split("").0.is_empty());
    }
}
