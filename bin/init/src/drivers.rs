//! Kernel modules: those of the initramfs, and the list of those to load at each boot.
//!
//! `/modules` of the initramfs lists the modules that the guest needs to find its disk and network,
//! one file name in `/lib/modules` per line, each after the modules that it depends on. All other
//! modules are in `/lib/modules` of the root file system.

use std::{fs, io, path::Path};

use rustix::{fd::AsFd as _, system::finit_module};

/// Path of the module list. The file exists only in the initramfs.
pub(crate) const LIST: &str = "/modules";

/// Directory of the modules in the initramfs.
const DIR: &str = "/lib/modules";

/// Directories with lists of modules to load at each boot (`modules-load.d(5)`).
const LOAD_DIRS: [&str; 2] = ["/etc/modules-load.d", "/usr/lib/modules-load.d"];

/// Loads the modules that the guest needs to find its disk and network. Load errors are ignored,
/// because some modules are for other machine types. Only the appearance of the disk matters.
pub(crate) fn load_early() {
    for name in fs::read_to_string(LIST).unwrap_or_default().lines() {
        let _ = load(name);
    }
}

fn load(name: &str) -> io::Result<()> {
    let file = fs::File::open(format!("{DIR}/{name}"))?;
    Ok(finit_module(file.as_fd(), c"", 0)?)
}

/// Returns the names of the modules to load at each boot.
pub(crate) fn listed() -> Vec<String> {
    let mut files: Vec<_> = LOAD_DIRS
        .iter()
        .filter_map(|dir| fs::read_dir(dir).ok())
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "conf")
        })
        .collect();
    files.sort();
    files.push(Path::new("/etc/modules").to_owned());
    let texts = files
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok());
    texts.flat_map(|text| names(&text)).collect()
}

/// Parses a list of modules: one name per line. Lines that begin with `#` or `;` are comments.
fn names(text: &str) -> Vec<String> {
    let name = |line: &str| line.split_whitespace().next().map(str::to_owned);
    let words = text.lines().filter_map(name);
    words.filter(|word| !word.starts_with(['#', ';'])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_one_module_per_line() {
        let text = "# comment\n\n; another\nvirtio-rng\n  loop max_loop=8\n";
        assert_eq!(names(text), ["virtio-rng", "loop"]);
        assert!(names("").is_empty());
    }
}
