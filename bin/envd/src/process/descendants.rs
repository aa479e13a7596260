//! Descendants of a process, found in `/proc`. Used where there are no cgroups.
//!
//! Covers children, their children, and all members of sessions that these processes lead. A
//! process that leads a session of its own and whose parent has ended is not related to its command
//! any more, and is not found. With cgroups, the kernel kills such processes as well.

use std::{collections::HashSet, fs};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Maximum number of searches for processes that were created during the previous search.
const SEARCHES: usize = 16;

/// Kills a process and its descendants. The caller has not waited for the process yet, so its id
/// belongs to no other process.
pub(super) fn kill_tree(root: i32) {
    // The processes are stopped first. A killed process would have no descendants any more, because
    // its children get another parent.
    let mut stopped = HashSet::new();
    for _ in 0..SEARCHES {
        let tree = tree_of(root, &all());
        let new: Vec<i32> = tree.difference(&stopped).copied().collect();
        if new.is_empty() {
            break;
        }
        for pid in new {
            let _ = kill(Pid::from_raw(pid), Signal::SIGSTOP);
            stopped.insert(pid);
        }
    }
    for pid in stopped {
        // The process may have ended before it was stopped.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Ids of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ids {
    pid: i32,
    parent: i32,
    session: i32,
}

/// Returns a process, its descendants, and the members of their sessions.
fn tree_of(root: i32, all: &[Ids]) -> HashSet<i32> {
    let mut tree = HashSet::from([root]);
    loop {
        let before = tree.len();
        for ids in all {
            if tree.contains(&ids.parent) || tree.contains(&ids.session) {
                tree.insert(ids.pid);
            }
        }
        if tree.len() == before {
            return tree;
        }
    }
}

/// Returns all processes.
fn all() -> Vec<Ids> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            let pid: i32 = name.to_str()?.parse().ok()?;
            // The process may have ended in the meantime.
            parse(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
        })
        .collect()
}

/// Parses `/proc/PID/stat` (`proc_pid_stat(5)`). The name of the program is in parentheses and may
/// contain any character.
fn parse(pid: i32, stat: &str) -> Option<Ids> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(1);
    let parent = fields.next()?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    Some(Ids {
        pid,
        parent,
        session,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(pid: i32, parent: i32, session: i32) -> Ids {
        Ids {
            pid,
            parent,
            session,
        }
    }

    #[test]
    fn a_name_with_a_parenthesis_does_not_shift_the_fields() {
        let stat = "17 (a) b) S 4 17 9 0 -1 4194560";
        assert_eq!(parse(17, stat), Some(ids(17, 4, 9)));
        assert_eq!(parse(17, "17 (a"), None);
        let own = fs::read_to_string("/proc/self/stat").expect("readable");
        let pid = i32::try_from(std::process::id()).expect("a pid");
        assert!(parse(pid, &own).is_some(), "{own}");
    }

    #[test]
    fn the_tree_has_orphans_of_its_sessions_and_nothing_else() {
        let all = [
            ids(1, 0, 1),
            ids(20, 1, 20),
            ids(10, 1, 10),
            // A child with a session of its own, and its orphan.
            ids(11, 10, 11),
            ids(12, 1, 11),
            // An orphan of the root's session, and its child.
            ids(13, 1, 10),
            ids(14, 13, 14),
            ids(21, 20, 20),
        ];
        let tree = tree_of(10, &all);
        assert_eq!(tree, HashSet::from([10, 11, 12, 13, 14]));
    }
}
