//! Resources that a service uses on the host, for comparison before and after a test.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::Result;

/// Names of all host resources that belong to sandboxes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traces {
    /// Network namespaces.
    pub namespaces: BTreeSet<String>,
    /// Network interfaces.
    pub links: BTreeSet<String>,
    /// Routes.
    pub routes: BTreeSet<String>,
    /// nftables rules and set elements.
    pub rules: BTreeSet<String>,
    /// cgroup directories.
    pub cgroups: BTreeSet<String>,
    /// Processes of supervisors, jails and VMMs.
    pub processes: BTreeSet<String>,
    /// Claimed network slots.
    pub slots: BTreeSet<String>,
    /// Entries of the service's directory of sandboxes.
    pub folders: BTreeSet<String>,
    /// Mounts whose line contains `wrenn`.
    pub mounts: BTreeSet<String>,
}

impl Traces {
    /// Lists the current resources.
    ///
    /// # Errors
    /// The host's tables cannot be read.
    pub fn of(data_dir: &Path) -> Result<Self> {
        Ok(Self {
            namespaces: names_in(Path::new("/run/netns")),
            links: names_in(Path::new("/sys/class/net")),
            routes: lines(&fs::read_to_string("/proc/net/route")?),
            rules: nft_rules()?,
            cgroups: cgroups(Path::new("/sys/fs/cgroup"), 4),
            processes: processes(),
            slots: names_in(Path::new("/run/wrenn/slots")),
            folders: names_in(&data_dir.join("sandboxes")),
            mounts: lines(&fs::read_to_string("/proc/self/mountinfo")?)
                .into_iter()
                .filter(|line| line.contains("wrenn"))
                .collect(),
        })
    }
}

/// Returns the number of open descriptors of a process, without the descriptors of its database.
/// The database's connection pool has three files per connection and grows when requests happen to
/// overlap.
#[must_use]
pub fn open_files(pid: u32) -> usize {
    let open = fs::read_dir(format!("/proc/{pid}/fd"));
    let targets = open.into_iter().flatten().flatten();
    targets
        .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
        .filter(|target| !target.to_string_lossy().contains("/wrenn.db"))
        .count()
}

/// Returns the resident memory of a process, in kB.
///
/// # Errors
/// The process does not exist.
pub fn resident_kb(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    Ok(line
        .and_then(|rest| rest.trim().trim_end_matches(" kB").trim().parse().ok())
        .unwrap_or(0))
}

fn names_in(dir: &Path) -> BTreeSet<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return BTreeSet::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

fn lines(text: &str) -> BTreeSet<String> {
    text.lines().map(str::to_owned).collect()
}

fn nft_rules() -> Result<BTreeSet<String>> {
    let output = std::process::Command::new("nft")
        .args(["--stateless", "list", "ruleset"])
        .output()?;
    Ok(lines(&String::from_utf8_lossy(&output.stdout)))
}

fn cgroups(dir: &Path, depth: usize) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    if depth == 0 {
        return found;
    }
    for name in names_in(dir) {
        let path = dir.join(&name);
        if !path.is_symlink() && path.is_dir() {
            if path.to_string_lossy().contains("wrenn") {
                found.insert(path.to_string_lossy().into_owned());
            }
            found.append(&mut cgroups(&path, depth - 1));
        }
    }
    found
}

/// Returns the processes that belong to sandboxes, as `pid command`.
fn processes() -> BTreeSet<String> {
    names_in(Path::new("/proc"))
        .into_iter()
        .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        .filter_map(|pid| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let ours = command.contains("qemu-system")
                || command.contains(" supervise ")
                || command.contains(" jail ");
            ours.then(|| format!("{pid} {}", command.chars().take(60).collect::<String>()))
        })
        .collect()
}

/// Returns the process id of a sandbox's VMM, if it runs.
#[must_use]
pub fn vmm_of(id: &str) -> Option<i32> {
    names_in(Path::new("/proc")).into_iter().find_map(|name| {
        let pid = name.parse().ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        (command.contains("qemu-system") && command.contains(&format!("-name {id} ")))
            .then_some(pid)
    })
}
