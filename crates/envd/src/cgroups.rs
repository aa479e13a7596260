//! Control groups (version 2): who yields to whom when the guest is busy or full.
//!
//! | group    | who                                         | CPU weight | memory                                    |
//! |----------|---------------------------------------------|-----------:|-------------------------------------------|
//! | `ptys`   | processes with a terminal                   |        200 | –                                         |
//! | `envd`   | this agent, its forwarded ports among it    |        150 | 5 MiB are never taken, 8 MiB hardly ever  |
//! | `system` | processes with the tag `_system`            |        100 | –                                         |
//! | `user`   | all others                                  |         50 | slowed at `high`, killed at `max`         |
//!
//! `high` is all memory but an eighth, or but 128 MiB if that is more. What lies above it cannot be reclaimed without swap:
//! at `high` alone a hog would be slowed ever more and never end, with everything that waits for it. So `max` is 1 MiB above,
//! which is passed before the kernel slows anybody noticeably: the hog dies, and nearly all of the reserve is still there
//! for terminals, this agent and the kernel. Processes are born into their group
//! ([`wrenn_sys::spawn`]).
//!
//! Owns the four groups below its root, and nothing else there. A kernel or a container that knows no such groups is said
//! once in the log; then processes are where the agent is.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd as _, BorrowedFd},
    path::Path,
};

/// The tag of processes that belong to the system.
pub const SYSTEM_TAG: &str = "_system";

/// `CGROUP2_SUPER_MAGIC` of `linux/magic.h`.
const CGROUP2_MAGIC: u32 = 0x6367_7270;

const MIB: u64 = 1024 * 1024;

/// How far above `high` a hog is killed. A quarter of the reserve was never reached: the kernel slowed the hog too much.
const ABOVE_HIGH_BYTES: u64 = MIB;

/// The most that is kept from the group `user`.
const MOST_RESERVE_BYTES: u64 = 128 * MIB;

/// Which group a process belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// It has a terminal.
    Terminal,
    /// It is part of the system.
    System,
    /// Any other.
    User,
}

impl Group {
    /// The group of a process.
    #[must_use]
    pub fn of(tag: Option<&str>, has_terminal: bool) -> Self {
        match (tag, has_terminal) {
            (Some(SYSTEM_TAG), _) => Self::System,
            (_, true) => Self::Terminal,
            (_, false) => Self::User,
        }
    }
}

/// The groups' directories; none where there are no groups.
#[derive(Debug, Default)]
pub struct Cgroups {
    groups: Option<Directories>,
}

#[derive(Debug)]
struct Directories {
    ptys: File,
    system: File,
    user: File,
}

impl Cgroups {
    /// Makes the groups below `root` and moves the caller into its own. What does not work is logged, once.
    #[must_use]
    pub fn set_up(root: &Path) -> Self {
        match Self::try_set_up(root) {
            Ok((groups, missing)) => {
                if !missing.is_empty() {
                    let missing = missing.join("; ");
                    tracing::warn!(%missing, "control groups are without some of their limits");
                }
                Self {
                    groups: Some(groups),
                }
            }
            Err(error) => {
                let root = root.display();
                tracing::warn!(%error, %root, "no control groups: processes run without limits");
                Self::default()
            }
        }
    }

    /// The directory of the group that a process is to be born into.
    #[must_use]
    pub fn directory(&self, group: Group) -> Option<BorrowedFd<'_>> {
        let groups = self.groups.as_ref()?;
        let directory = match group {
            Group::Terminal => &groups.ptys,
            Group::System => &groups.system,
            Group::User => &groups.user,
        };
        Some(directory.as_fd())
    }

    /// The groups, and what could not be set.
    fn try_set_up(root: &Path) -> io::Result<(Directories, Vec<String>)> {
        let kind = rustix::fs::statfs(root)?.f_type;
        if u32::try_from(kind) != Ok(CGROUP2_MAGIC) {
            return Err(io::Error::other("not a hierarchy of version 2"));
        }
        let make = |name: &str| match fs::create_dir(root.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => File::open(root.join(name)),
        };
        make("envd")?;
        // Before controllers are enabled: then a group with groups below it may have no processes.
        fs::write(root.join("envd/cgroup.procs"), "0")?;
        let groups = Directories {
            ptys: make("ptys")?,
            system: make("system")?,
            user: make("user")?,
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

/// What is written where, for a machine with so much memory.
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

/// Limits of the group `user`.
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
        assert!(groups.directory(Group::User).is_none());
        assert_eq!(fs::read_dir(dir.path()).expect("there").count(), 0);
    }
}
