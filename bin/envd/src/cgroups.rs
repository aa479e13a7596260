//! Control groups (cgroup v2): priorities of processes when the guest's CPU or memory is exhausted.
//!
//! | group    | processes                      | CPU weight | memory                              |
//! |----------|--------------------------------|-----------:|-------------------------------------|
//! | `ptys`   | with a terminal                |        200 | –                                   |
//! | `envd`   | envd, with its forwarded ports |        150 | 5 MiB never reclaimed, 8 MiB rarely |
//! | `system` | with the tag `_system`         |        100 | –                                   |
//! | `user`   | all others                     |         50 | slowed at `high`, killed at `max`   |
//!
//! `high` is the total memory minus a reserve of one eighth, at most 128 MiB. Memory above `high`
//! cannot be reclaimed without swap. With `high` alone, the kernel would slow a memory hog more and
//! more and never end it, and everything that waits for the hog would wait forever. `max` is
//! therefore 1 MiB above `high`. The hog passes `max` before the kernel slows any process
//! noticeably. The hog is killed, and almost all of the reserve remains for terminals, envd and the
//! kernel.
//!
//! Each command has a group of its own below the group of its kind ([`CommandGroup`]), in which its
//! process is created ([`wrenn_sys::spawn`]).
//!
//! Owns the four groups below its root with all groups below them, and nothing else there. If the
//! kernel or a container does not support such groups, envd logs this once, and processes run in
//! envd's own group.

mod command;

use std::{
    fs::{self, File},
    io,
    path::Path,
    sync::Arc,
};

pub use self::command::CommandGroup;
use self::command::KindGroup;

/// Tag of processes that belong to the system.
pub const SYSTEM_TAG: &str = "_system";

/// `CGROUP2_SUPER_MAGIC` of `linux/magic.h`.
const CGROUP2_MAGIC: u32 = 0x6367_7270;

const MIB: u64 = 1024 * 1024;

/// Distance from `high` to `max`, in bytes. A distance of a quarter of the reserve did not work:
/// the kernel slowed the hog so much that it never reached `max`.
const ABOVE_HIGH_BYTES: u64 = MIB;

/// Maximum memory that is reserved from the group `user`, in bytes.
const MOST_RESERVE_BYTES: u64 = 128 * MIB;

/// Group of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Processes with a terminal.
    Terminal,
    /// Processes of the system.
    System,
    /// All other processes.
    User,
}

impl Group {
    /// Returns the group of a process.
    #[must_use]
    pub fn of(tag: Option<&str>, has_terminal: bool) -> Self {
        match (tag, has_terminal) {
            (Some(SYSTEM_TAG), _) => Self::System,
            (_, true) => Self::Terminal,
            (_, false) => Self::User,
        }
    }
}

/// Groups of the kinds of processes. Empty if there are no groups.
#[derive(Debug, Default)]
pub struct Cgroups {
    groups: Option<Directories>,
}

#[derive(Debug)]
struct Directories {
    ptys: Arc<KindGroup>,
    system: Arc<KindGroup>,
    user: Arc<KindGroup>,
}

impl Cgroups {
    /// Creates the groups below `root` and moves the caller into its own. Failures are logged once.
    #[must_use]
    pub fn set_up(root: &Path) -> Self {
        match Self::try_set_up(root) {
            Ok((groups, missing)) => {
                if !missing.is_empty() {
                    let missing = missing.join("; ");
                    tracing::warn!(%missing, "failed to set some cgroup limits");
                }
                Self {
                    groups: Some(groups),
                }
            }
            Err(error) => {
                let root = root.display();
                tracing::warn!(%error, %root, "cgroups unavailable, processes run without limits");
                Self::default()
            }
        }
    }

    /// Creates the group of a new command. Returns `None` if there are no groups, or a program in
    /// the guest has removed the group of the command's kind.
    #[must_use]
    pub fn create(&self, group: Group) -> Option<CommandGroup> {
        let groups = self.groups.as_ref()?;
        let kind = match group {
            Group::Terminal => &groups.ptys,
            Group::System => &groups.system,
            Group::User => &groups.user,
        };
        kind.create()
            .inspect_err(|error| tracing::warn!(%error, ?group, "failed to create a cgroup"))
            .ok()
    }

    /// Creates the groups. Returns them and a list of the settings that failed.
    fn try_set_up(root: &Path) -> io::Result<(Directories, Vec<String>)> {
        let kind = rustix::fs::statfs(root)?.f_type;
        if u32::try_from(kind) != Ok(CGROUP2_MAGIC) {
            return Err(io::Error::other("not a cgroup v2 hierarchy"));
        }
        let make = |name: &str| match fs::create_dir(root.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => File::open(root.join(name)),
        };
        make("envd")?;
        // Written before controllers are enabled: after that, a group that has child groups may not
        // have processes.
        fs::write(root.join("envd/cgroup.procs"), "0")?;
        let kind = |name: &str| make(name).map(|directory| Arc::new(KindGroup::new(directory)));
        let groups = Directories {
            ptys: kind("ptys")?,
            system: kind("system")?,
            user: kind("user")?,
        };
        let mut missing = Vec::new();
        for (file, value) in settings(total_memory()) {
            if let Err(error) = fs::write(root.join(file), &value) {
                missing.push(format!("{file} = {value}: {error}"));
            }
        }
        Ok((groups, missing))
    }
}

/// Returns files and values to write, for a guest with `total_bytes` of memory.
fn settings(total_bytes: u64) -> Vec<(&'static str, String)> {
    let limits = Limits::of(total_bytes);
    let words = [
        ("cgroup.subtree_control", "+cpu".to_owned()),
        ("cgroup.subtree_control", "+memory".to_owned()),
        ("ptys/cpu.weight", "200".to_owned()),
        ("envd/cpu.weight", "150".to_owned()),
        ("user/cpu.weight", "50".to_owned()),
        ("envd/memory.min", (5 * MIB).to_string()),
        ("envd/memory.low", (8 * MIB).to_string()),
        ("user/memory.high", limits.high_bytes.to_string()),
        ("user/memory.max", limits.max_bytes.to_string()),
    ];
    words.into()
}

/// Memory limits of the group `user`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    high_bytes: u64,
    max_bytes: u64,
}

impl Limits {
    fn of(total_bytes: u64) -> Self {
        let reserve = (total_bytes / 8).min(MOST_RESERVE_BYTES);
        let high_bytes = total_bytes - reserve;
        Self {
            high_bytes,
            max_bytes: high_bytes + ABOVE_HIGH_BYTES,
        }
    }
}

fn total_memory() -> u64 {
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit.max(1));
    #[allow(
        clippy::useless_conversion,
        reason = "the kernel's word is as wide as the machine's"
    )]
    u64::from(info.totalram).saturating_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_memory_is_kept_from_users() {
        let limits = Limits::of(512 * MIB);
        assert_eq!(
            (limits.high_bytes, limits.max_bytes),
            (448 * MIB, 449 * MIB)
        );
        let limits = Limits::of(8192 * MIB);
        assert_eq!(
            (limits.high_bytes, limits.max_bytes),
            (8064 * MIB, 8065 * MIB)
        );
        assert!(total_memory() > 100 * MIB);
    }

    #[test]
    fn each_process_has_its_group() {
        assert_eq!(Group::of(None, false), Group::User);
        assert_eq!(Group::of(Some("mine"), true), Group::Terminal);
        assert_eq!(Group::of(Some(SYSTEM_TAG), true), Group::System);
    }

    #[test]
    fn a_directory_that_holds_no_groups_is_survived() {
        let dir = tempfile::tempdir().expect("a directory");
        let groups = Cgroups::set_up(dir.path());
        assert!(groups.create(Group::User).is_none());
        assert_eq!(fs::read_dir(dir.path()).expect("there").count(), 0);
    }
}
