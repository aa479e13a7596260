//! cgroups: how much of the host a sandbox may use, and which processes are its.
//!
//! Every sandbox has a directory `wrenn/<instance>/<id>` in each hierarchy that limits something: one hierarchy on cgroup
//! v2, one a controller on v1, both on a hybrid host. `<instance>` stands for the agent's data directory, so that
//! several agents share a host.
//!
//! Owns: those directories. The VMM's jail enters them itself. A host without a usable controller gets no limits, said
//! once in the log. [`Cgroups::remove`] kills what is left inside, and may be called again.

mod hierarchy;

use std::{fs, io, path::PathBuf, time::Duration};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use wrenn_proto::SandboxId;

use hierarchy::{Hierarchy, Setting};

/// How long killed processes may take to be gone: a VMM has to give back all of its guest's memory.
const KILL_DEADLINE: Duration = Duration::from_secs(20);

/// How long the kernel may take to see that a group is empty.
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);

const POLL: Duration = Duration::from_millis(5);

/// What the VMM needs beside its guest's memory: its own code and buffers, and what translated guest code takes without
/// hardware virtualization (QEMU's cache for it is 128 MiB).
const MEMORY_OVERHEAD_MIB: u64 = 128 + 128;

/// Processor time beside the virtual CPUs, for the VMM's own threads; percent of one CPU.
const CPU_OVERHEAD_PERCENT: u64 = 25;

/// Threads of a VMM: one a virtual CPU, and up to 64 for disk requests.
const THREADS_OVERHEAD: u64 = 128;

/// Why a group could not be made or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum CgroupError {
    /// A file operation failed.
    #[error("could not {step} {path}")]
    Io {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Processes survived SIGKILL.
    #[error("processes {pids:?} are still there {KILL_DEADLINE:?} after SIGKILL")]
    Unkillable { pids: Vec<i32> },
}

impl CgroupError {
    fn is_busy(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::ResourceBusy)
    }
}

/// What a sandbox may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    memory_bytes: u64,
    cpu_percent: u64,
    threads: u64,
}

impl Limits {
    /// Limits of a sandbox of this size, with what its VMM needs itself.
    pub(crate) fn for_guest(memory_mib: u32, vcpus: u32) -> Self {
        Self {
            memory_bytes: (u64::from(memory_mib) + MEMORY_OVERHEAD_MIB) * 1024 * 1024,
            cpu_percent: u64::from(vcpus) * 100 + CPU_OVERHEAD_PERCENT,
            threads: u64::from(vcpus) + THREADS_OVERHEAD,
        }
    }
}

/// The cgroups of one agent.
#[derive(Debug, Clone)]
pub(crate) struct Cgroups {
    hierarchies: Vec<Hierarchy>,
    instance: String,
}

impl Cgroups {
    /// Finds out what this host has.
    pub(crate) fn detect(instance: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let hierarchies = hierarchy::detect(&mounts);
        if hierarchies.is_empty() {
            tracing::warn!(
                "no usable cgroup controller: sandboxes run without limits of CPU and memory"
            );
        }
        Self {
            hierarchies,
            instance: instance.to_owned(),
        }
    }

    /// The directories of a sandbox, whether they exist or not.
    pub(crate) fn directories(&self, id: &SandboxId) -> Vec<PathBuf> {
        let path = |h: &Hierarchy| h.instance_dir(&self.instance).join(id);
        self.hierarchies.iter().map(path).collect()
    }

    /// Makes a sandbox's groups. Nothing is left when this fails.
    pub(crate) fn create(
        &self,
        id: &SandboxId,
        limits: Limits,
    ) -> Result<Vec<PathBuf>, CgroupError> {
        let created = self.hierarchies.iter().try_for_each(|hierarchy| {
            let dir = hierarchy
                .create(&self.instance, id.as_str())
                .map_err(failed(
                    "make the cgroup",
                    hierarchy.instance_dir(&self.instance).join(id),
                ))?;
            for Setting { file, value } in hierarchy.settings(limits) {
                let path = dir.join(file);
                fs::write(&path, value).map_err(failed("set the limit", path))?;
            }
            Ok(())
        });
        if let Err(error) = created {
            for dir in self.directories(id) {
                let _ = fs::remove_dir(dir);
            }
            self.remove_empty_parents();
            return Err(error);
        }
        Ok(self.directories(id))
    }

    /// Kills what runs in a sandbox's groups and removes them. Fine if there are none.
    pub(crate) async fn remove(&self, id: &SandboxId) -> Result<(), CgroupError> {
        let deadline = tokio::time::Instant::now() + REMOVE_DEADLINE;
        let directories = self.directories(id);
        loop {
            kill_while_found(|| processes(&directories)).await?;
            match directories.iter().try_for_each(remove_group) {
                Ok(()) => break,
                // The kernel has not seen yet that it is empty, or a process came in that was on its way when the others
                // were killed.
                Err(error) if error.is_busy() && tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(POLL).await;
                }
                Err(error) => return Err(error),
            }
        }
        self.remove_empty_parents();
        Ok(())
    }

    /// Names of the sandboxes that have groups of this agent.
    pub(crate) fn existing(&self) -> Vec<SandboxId> {
        let mut found: Vec<SandboxId> = self
            .hierarchies
            .iter()
            .filter_map(|h| fs::read_dir(h.instance_dir(&self.instance)).ok())
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        found.sort();
        found.dedup();
        found
    }

    /// Whether this host limits nothing.
    pub(crate) fn are_missing(&self) -> bool {
        self.hierarchies.is_empty()
    }

    /// The last one out removes the parents; another that comes in at the same time makes them again.
    fn remove_empty_parents(&self) {
        for hierarchy in &self.hierarchies {
            let instance = hierarchy.instance_dir(&self.instance);
            if fs::remove_dir(&instance).is_ok()
                && let Some(parent) = instance.parent()
            {
                let _ = fs::remove_dir(parent);
            }
        }
    }
}

/// Kills all processes of a user of ours and waits until they are gone: where there are no groups, a sandbox's
/// processes are known by the user id of its slot.
pub(crate) async fn kill_processes_of(uid: u32) -> Result<(), CgroupError> {
    let find = || {
        let entries = fs::read_dir("/proc").map_err(failed("list", "/proc".into()))?;
        let process = |entry: io::Result<fs::DirEntry>| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse::<i32>().ok()?;
            is_live_process_of(pid, uid).then_some(Pid::from_raw(pid))
        };
        Ok(entries.filter_map(process).collect())
    };
    kill_while_found(find).await
}

/// Nothing is left of a zombie but its number, until its parent asks for it.
fn is_live_process_of(pid: i32, uid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_whitespace().next())
    };
    field("Uid:") == Some(uid.to_string().as_str()) && field("State:") != Some("Z")
}

async fn kill_while_found(
    find: impl Fn() -> Result<Vec<Pid>, CgroupError>,
) -> Result<(), CgroupError> {
    let deadline = tokio::time::Instant::now() + KILL_DEADLINE;
    loop {
        let pids = find()?;
        if pids.is_empty() {
            return Ok(());
        }
        if tokio::time::Instant::now() > deadline {
            let pids = pids.into_iter().map(Pid::as_raw).collect();
            return Err(CgroupError::Unkillable { pids });
        }
        for pid in pids {
            match kill(pid, Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => tracing::warn!(%pid, %error, "could not kill a process"),
            }
        }
        tokio::time::sleep(POLL).await;
    }
}

fn processes(directories: &[PathBuf]) -> Result<Vec<Pid>, CgroupError> {
    let mut pids = Vec::new();
    for dir in directories {
        let path = dir.join("cgroup.procs");
        match fs::read_to_string(&path) {
            Ok(text) => pids.extend(text.lines().filter_map(|pid| pid.parse::<i32>().ok())),
            // ENODEV: removed while it was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => {}
            Err(error) => return Err(failed("read", path)(error)),
        }
    }
    pids.sort_unstable();
    pids.dedup();
    Ok(pids.into_iter().map(Pid::from_raw).collect())
}

fn remove_group(dir: &PathBuf) -> Result<(), CgroupError> {
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed("remove the cgroup", dir.clone())(error))
        }
        _ => Ok(()),
    }
}

fn failed(step: &'static str, path: PathBuf) -> impl FnOnce(io::Error) -> CgroupError {
    move |source| CgroupError::Io { step, path, source }
}

#[cfg(test)]
mod tests;
