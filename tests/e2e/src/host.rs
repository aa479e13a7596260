//! Resources that a service uses on the host, for comparison before and after a test.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

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
    /// Processes of supervisors, jails, VMMs and tools for disks.
    pub processes: BTreeSet<String>,
    /// Claimed network slots.
    pub slots: BTreeSet<String>,
    /// Entries of the service's directory of sandboxes.
    pub sandbox_dirs: BTreeSet<String>,
    /// Mounts whose line contains `wrenn`.
    pub mounts: BTreeSet<String>,
    /// Files of the service's snapshots, including staged ones and names.
    pub snapshots: BTreeSet<String>,
    /// Memory files of the service, of supervisors and of VMMs, by name and number.
    pub memory_files: BTreeSet<String>,
    /// Connections to and from sandboxes that the kernel tracks as established.
    pub connections: BTreeSet<String>,
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
            sandbox_dirs: names_in(&data_dir.join("sandboxes")),
            mounts: lines(&fs::read_to_string("/proc/self/mountinfo")?)
                .into_iter()
                .filter(|line| line.contains("wrenn"))
                .collect(),
            snapshots: snapshots(&data_dir.join("snapshots")),
            memory_files: memory_files(),
            connections: tracked_connections()?,
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
    let output = Command::new("nft")
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
    commands()
        .into_iter()
        .filter(|(_, command)| is_of_sandbox(command))
        .map(|(pid, command)| format!("{pid} {}", command.chars().take(60).collect::<String>()))
        .collect()
}

/// True if a command line is that of a supervisor, a jail, a VMM or a tool for disks.
fn is_of_sandbox(command: &str) -> bool {
    let parts = [
        "qemu-system",
        "qemu-storage-daemon",
        "firecracker --id ",
        " supervise ",
        " jail ",
    ];
    parts.iter().any(|part| command.contains(part))
}

/// Returns the process ids and the command lines of all processes.
fn commands() -> Vec<(String, String)> {
    let pids = names_in(Path::new("/proc")).into_iter();
    pids.filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        .filter_map(|pid| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            Some((pid, command))
        })
        .collect()
}

/// Returns the files of a snapshot store, without its lock, as paths below the store.
fn snapshots(store: &Path) -> BTreeSet<String> {
    let areas = ["memory", "disks", "snapshots", "staging", "names"].into_iter();
    areas
        .flat_map(|area| {
            let names = names_in(&store.join(area)).into_iter();
            names.map(move |name| format!("snapshots/{area}/{name}"))
        })
        .collect()
}

/// Returns the memory files (memfds) that are open or mapped in processes of the service. Each file
/// counts once, however many processes have it. Files of the same name are numbered, because inodes
/// and processes are not the same in two lists.
fn memory_files() -> BTreeSet<String> {
    let mut found = BTreeMap::<String, BTreeSet<u64>>::new();
    for (pid, command) in commands() {
        if !is_of_sandbox(&command) && !command.contains("wrenn up") {
            continue;
        }
        for (name, inode) in open_memory_files(&pid)
            .into_iter()
            .chain(mapped_memory_files(&pid))
        {
            found.entry(name).or_default().insert(inode);
        }
    }
    let numbered = found.into_iter().flat_map(|(name, inodes)| {
        (1..=inodes.len()).map(move |number| format!("{name} {number}"))
    });
    numbered.collect()
}

fn open_memory_files(pid: &str) -> Vec<(String, u64)> {
    let open = fs::read_dir(format!("/proc/{pid}/fd"));
    let open = open.into_iter().flatten().flatten();
    open.filter_map(|entry| {
        let target = fs::read_link(entry.path()).ok()?;
        let name = memory_file_name(target.to_str()?)?;
        Some((name, fs::metadata(entry.path()).ok()?.ino()))
    })
    .collect()
}

/// Reads lines `ADDRESS MODE OFFSET DEVICE INODE PATH` (`proc_pid_maps(5)`).
fn mapped_memory_files(pid: &str) -> Vec<(String, u64)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    maps.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace().skip(4);
            let inode = fields.next()?.parse().ok()?;
            Some((memory_file_name(fields.next()?)?, inode))
        })
        .collect()
}

fn memory_file_name(target: &str) -> Option<String> {
    let name = target.strip_prefix("/memfd:")?;
    let name = name.strip_suffix(" (deleted)").unwrap_or(name);
    Some(format!("memfd:{name}"))
}

/// Returns the tracked connections that are established and have an address of a sandbox's link.
/// Connections that were closed stay in the table for two minutes, in other states.
fn tracked_connections() -> Result<BTreeSet<String>> {
    let of_sandbox = |line: &&str| {
        let mut fields = line.split_whitespace();
        line.contains("ESTABLISHED")
            && fields.any(|field| {
                let address = field.split_once('=').map_or("", |(_, value)| value);
                address.starts_with("10.11.") || address.starts_with("10.12.")
            })
    };
    let table = connection_table()?;
    let lines = table.lines().filter(of_sandbox);
    // Counters and timeouts change.
    let endpoints = |line: &str| {
        let fields = line.split_whitespace();
        let parts = ["src=", "dst=", "sport=", "dport="];
        let kept = fields.filter(|field| parts.iter().any(|part| field.starts_with(part)));
        kept.collect::<Vec<_>>().join(" ")
    };
    Ok(lines.map(endpoints).collect())
}

/// Reads the kernel's table of connections, by a program on kernels without the file.
fn connection_table() -> Result<String> {
    if let Ok(table) = fs::read_to_string("/proc/net/nf_conntrack") {
        return Ok(table);
    }
    let output = Command::new("conntrack").args(["-L"]).output();
    let output = output.context("failed to run `conntrack`")?;
    ensure!(output.status.success(), "conntrack: {output:?}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Process of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Supervisor.
    Supervisor,
    /// QEMU or Firecracker.
    Vmm,
    /// Presents the disk to a VMM without a reader for its format.
    DiskExporter,
}

/// Returns the process id of a sandbox's VMM, if it runs.
#[must_use]
pub fn vmm_of(id: &str) -> Option<i32> {
    process_of(id, Role::Vmm)
}

/// Returns the id of a process of a sandbox, if it runs.
#[must_use]
pub fn process_of(id: &str, role: Role) -> Option<i32> {
    let found = commands().into_iter().find(|(pid, command)| match role {
        Role::Vmm => {
            command.contains("qemu-system") && command.contains(&format!("-name {id} "))
                || command.contains(&format!("firecracker --id {id} "))
        }
        Role::Supervisor => command.contains(" supervise ") && command.contains(id),
        // The exporter's command line does not name its sandbox.
        Role::DiskExporter => {
            command.contains("qemu-storage-daemon")
                && parent_of(pid) == process_of(id, Role::Supervisor)
        }
    });
    found?.0.parse().ok()
}

/// Returns the process id of a process's parent, from `PID (NAME) STATE PARENT …`
/// (`proc_pid_stat(5)`).
fn parent_of(pid: &str) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(1)?.parse().ok()
}
