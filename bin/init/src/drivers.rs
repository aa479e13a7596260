//! Kernel modules of the initramfs.
//!
//! `/modules` lists the modules, one file name in `/lib/modules` per line, each after the modules
//! that it depends on. An empty line ends the modules that the guest needs to find its disk and
//! network. The others are loaded once envd serves requests.

use std::{fs, io};

use rustix::{fd::AsFd as _, system::finit_module};

/// Path of the module list. The file exists only in the initramfs.
pub(crate) const LIST: &str = "/modules";

/// Directory of the modules in the initramfs.
pub(crate) const DIR: &str = "/lib/modules";

/// Directory in which [`load_late`] finds its modules after the change of root. The directory is in
/// memory and exists until the modules are loaded.
pub(crate) const LATE_DIR: &str = "/run/wrenn-modules";

/// Loads the modules that the guest needs to find its disk and network. Load errors are ignored,
/// because some modules are for other machine types. Only the appearance of the disk matters.
pub(crate) fn load_early() {
    for name in names().0 {
        let _ = load(DIR, &name);
    }
}

/// Returns the names of the early modules and of the late modules.
pub(crate) fn names() -> (Vec<String>, Vec<String>) {
    split(&fs::read_to_string(LIST).unwrap_or_default())
}

fn split(list: &str) -> (Vec<String>, Vec<String>) {
    let (early, late) = list.split_once("\n\n").unwrap_or((list, ""));
    let names = |part: &str| part.lines().map(str::to_owned).collect();
    (names(early), names(late))
}

/// Loads the late modules and removes their files.
pub(crate) fn load_late() {
    let Ok(order) = fs::read_to_string(format!("{LATE_DIR}/order")) else {
        return;
    };
    for name in order.lines() {
        let _ = load(LATE_DIR, name);
    }
    let _ = fs::remove_dir_all(LATE_DIR);
}

/// Saves the late modules in `/run` of the new root, which must be mounted.
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
