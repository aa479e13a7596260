//! Cgroups: resource limits of sandboxes, and membership of their processes.
//!
//! Every sandbox has a directory `wrenn/<instance>/<id>` for its VMM, and one `<id>.supervisor` for
//! its supervisor, in each hierarchy with a controller that limits it: one hierarchy on cgroup v2,
//! one per controller on v1, both kinds on a hybrid host. `<instance>` identifies the agent's data
//! directory, so several agents can share a host. Its group limits the memory of all sandboxes
//! together, so that they never use the host's reserve.
//!
//! Owns these directories. The VMM's jail and the supervisor enter them themselves. On a host
//! without a usable controller there are no limits, which [`policy`] permits or not.
//! [`Cgroups::remove`] kills the remaining processes and is idempotent.

mod hierarchy;
mod io_limit;
pub(crate) mod policy;

use std::{fs, io, path::PathBuf, time::Duration};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use wrenn_model::{MachineSize, SandboxId};

use crate::network::addresses::Slot;

use hierarchy::{Controller, Hierarchy, Setting};
pub(crate) use io_limit::IoLimit;

/// Maximum time for killed processes to disappear. The kernel must free all guest memory of a VMM
/// first.
const KILL_DEADLINE: Duration = Duration::from_secs(20);

/// Maximum time for the kernel to notice that a group is empty.
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);

const POLL: Duration = Duration::from_millis(5);

/// Memory limit on top of guest memory, MiB. Covers the VMM's own code and buffers, and translated
/// guest code if there is no hardware virtualization (QEMU's translation cache is 128 MiB).
const MEMORY_OVERHEAD_MIB: u64 = 128 + 128;

/// CPU limit on top of the virtual CPUs, for the VMM's own threads, in percent of one CPU.
const CPU_OVERHEAD_PERCENT: u64 = 25;

/// Thread limit on top of one thread per virtual CPU. A VMM uses up to 64 threads for disk
/// requests.
const THREADS_OVERHEAD: u64 = 128;

/// CPU limit of a supervisor, in percent of one CPU: the page server and a snapshot each use one.
const SUPERVISOR_CPU_PERCENT: u64 = 200;

/// Memory limit of a program that measures or merges disk layers, MiB.
const TOOL_MEMORY_MIB: u64 = 512;

/// Thread limit of a supervisor and of the jail that it starts.
const SUPERVISOR_THREADS: u64 = 64;

/// Failure to create or remove a group.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum CgroupError {
    /// A file operation failed.
    #[error("failed to {step} {path}")]
    Io {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Processes survived SIGKILL.
    #[error("processes {pids:?} still exist {KILL_DEADLINE:?} after SIGKILL")]
    Unkillable { pids: Vec<i32> },
}

impl CgroupError {
    fn is_busy(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::ResourceBusy)
    }
}

/// Resource limits of one sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    memory_bytes: u64,
    cpu_percent: u64,
    threads: u64,
}

impl Limits {
    /// Returns the limits for a guest of this size, including the overhead of its VMM.
    pub(crate) fn for_guest(size: MachineSize) -> Self {
        Self {
            memory_bytes: size.memory_bytes() + MEMORY_OVERHEAD_MIB * 1024 * 1024,
            cpu_percent: u64::from(size.vcpus) * 100 + CPU_OVERHEAD_PERCENT,
            threads: u64::from(size.vcpus) + THREADS_OVERHEAD,
        }
    }

    /// Returns the limits for the supervisor of a guest of this size. It holds the memory of the
    /// snapshot that the guest runs from, which counts for the first supervisor that fills it.
    pub(crate) fn for_supervisor(size: MachineSize) -> Self {
        Self {
            memory_bytes: size.memory_bytes() + MEMORY_OVERHEAD_MIB * 1024 * 1024,
            cpu_percent: SUPERVISOR_CPU_PERCENT,
            threads: SUPERVISOR_THREADS,
        }
    }

    /// Returns the limits for a program that measures or merges disk layers. The page cache of the
    /// files counts, and is reclaimed.
    const fn for_tool() -> Self {
        Self {
            memory_bytes: TOOL_MEMORY_MIB * 1024 * 1024,
            cpu_percent: SUPERVISOR_CPU_PERCENT,
            threads: THREADS_OVERHEAD,
        }
    }
}

/// The cgroups of one agent.
#[derive(Debug, Clone)]
pub(crate) struct Cgroups {
    hierarchies: Vec<Hierarchy>,
    instance: String,
    common: CommonLimits,
}

/// Limits that are the same for all sandboxes of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CommonLimits {
    /// Memory that all sandboxes together may use, in bytes.
    pub(crate) memory_bytes: u64,
    /// Swap space of one sandbox, in bytes.
    pub(crate) swap_bytes: u64,
    /// Disk requests of one sandbox.
    pub(crate) io: Option<IoLimit>,
}

/// Prefix of the groups of programs that measure and merge disk layers. No sandbox ID begins so.
const TOOL: &str = ".tool-";

/// Suffix of the group of a sandbox's supervisor, which no sandbox ID contains.
const SUPERVISOR: &str = ".supervisor";

impl Cgroups {
    /// Detects the usable hierarchies of this host.
    pub(crate) fn detect(instance: &str, common: CommonLimits) -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let hierarchies = hierarchy::detect(&mounts);
        Self {
            hierarchies,
            instance: instance.to_owned(),
            common,
        }
    }

    /// Returns the group directories of a sandbox. They need not exist.
    pub(crate) fn directories(&self, id: &SandboxId) -> Vec<PathBuf> {
        let path = |h: &Hierarchy| h.instance_dir(&self.instance).join(id);
        self.hierarchies.iter().map(path).collect()
    }

    /// Returns the directories of the groups of a sandbox's supervisor. They need not exist.
    pub(crate) fn supervisor_directories(&self, id: &SandboxId) -> Vec<PathBuf> {
        let name = format!("{id}{SUPERVISOR}");
        let path = |h: &Hierarchy| h.instance_dir(&self.instance).join(&name);
        self.hierarchies.iter().map(path).collect()
    }

    /// Creates the groups of a sandbox's VMM and of its supervisor. On failure, none remain.
    pub(crate) fn create(
        &self,
        id: &SandboxId,
        limits: Limits,
        supervisor: Limits,
    ) -> Result<(), CgroupError> {
        let name = format!("{id}{SUPERVISOR}");
        // The guest's limit of disk requests must not slow down its snapshots and page faults.
        let of_supervisor = CommonLimits {
            io: None,
            ..self.common.clone()
        };
        let created = self
            .create_groups(id.as_str(), limits, &self.common)
            .and_then(|()| self.create_groups(&name, supervisor, &of_supervisor));
        if created.is_err() {
            for dir in self.all_directories(id) {
                let _ = fs::remove_dir(dir);
            }
            self.remove_empty_parents();
        }
        created
    }

    fn create_groups(
        &self,
        name: &str,
        limits: Limits,
        common: &CommonLimits,
    ) -> Result<(), CgroupError> {
        for hierarchy in &self.hierarchies {
            let step = "create the cgroup";
            let path = hierarchy.instance_dir(&self.instance).join(name);
            let dir = hierarchy.create(&self.instance, name, common.memory_bytes);
            let dir = dir.map_err(cgroup_failed(step, path))?;
            for setting in hierarchy.settings(limits, common) {
                let path = dir.join(setting.file);
                match fs::write(&path, setting.value) {
                    Err(error) if setting.is_optional => {
                        tracing::debug!(path = %path.display(), %error, "limit not supported");
                    }
                    written => written.map_err(cgroup_failed("write the limit", path))?,
                }
            }
        }
        Ok(())
    }

    /// Returns the directories of the groups of a sandbox's VMM and of its supervisor.
    fn all_directories(&self, id: &SandboxId) -> Vec<PathBuf> {
        let mut all = self.directories(id);
        all.extend(self.supervisor_directories(id));
        all
    }

    /// Creates the groups of a program that measures or merges disk layers, and returns their
    /// directories. They are removed with those of the last sandbox.
    pub(crate) fn create_for_tool(&self, number: u32) -> Result<Vec<PathBuf>, CgroupError> {
        let name = format!("{TOOL}{number}");
        self.create_groups(&name, Limits::for_tool(), &self.common)?;
        let path = |h: &Hierarchy| h.instance_dir(&self.instance).join(&name);
        Ok(self.hierarchies.iter().map(path).collect())
    }

    /// Gives a sandbox priority while its kernel boots, or takes that back. A failure is logged:
    /// the boot works without.
    pub(crate) fn set_booting(&self, id: &SandboxId, limits: Limits, booting: bool) {
        for hierarchy in &self.hierarchies {
            let dir = hierarchy.instance_dir(&self.instance).join(id);
            for Setting { file, value, .. } in hierarchy.boot_settings(limits, booting) {
                if let Err(error) = fs::write(dir.join(file), &value) {
                    tracing::warn!(%error, file, value, "failed to set the CPU priority");
                }
            }
        }
    }

    /// Kills all processes in a sandbox's groups and removes the groups. Succeeds if there are
    /// none.
    pub(crate) async fn remove(&self, id: &SandboxId) -> Result<(), CgroupError> {
        let deadline = tokio::time::Instant::now() + REMOVE_DEADLINE;
        let directories = self.all_directories(id);
        loop {
            kill_while_found(|| processes(&directories)).await?;
            match directories.iter().try_for_each(remove_group) {
                Ok(()) => break,
                // The kernel has not yet noticed that the group is empty, or a process was just
                // joining while the others were killed.
                Err(error) if error.is_busy() && tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(POLL).await;
                }
                Err(error) => return Err(error),
            }
        }
        self.remove_empty_parents();
        Ok(())
    }

    /// Returns the IDs of the sandboxes that have groups of this agent.
    pub(crate) fn existing(&self) -> Vec<SandboxId> {
        let mut found: Vec<SandboxId> = self
            .hierarchies
            .iter()
            .filter_map(|h| fs::read_dir(h.instance_dir(&self.instance)).ok())
            .flatten()
            .filter_map(|entry| {
                let name = entry.ok()?.file_name();
                let name = name.to_str()?;
                name.strip_suffix(SUPERVISOR).unwrap_or(name).parse().ok()
            })
            .collect();
        found.sort();
        found.dedup();
        found
    }

    /// Returns the names of the required controllers that this host lacks.
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        let is_missing = |c: &Controller| !self.hierarchies.iter().any(|h| h.has(*c));
        let missing = Controller::REQUIRED.into_iter().filter(is_missing);
        missing.map(|controller| controller.name(true)).collect()
    }

    /// True if this host has no usable hierarchy, so nothing is limited.
    pub(crate) fn are_missing(&self) -> bool {
        self.hierarchies.is_empty()
    }

    /// Removes the parent directories if this was the last group. A concurrent create makes them
    /// again.
    fn remove_empty_parents(&self) {
        if !self.existing().is_empty() {
            return;
        }
        for hierarchy in &self.hierarchies {
            let instance = hierarchy.instance_dir(&self.instance);
            remove_tools(&instance);
            if fs::remove_dir(&instance).is_ok()
                && let Some(parent) = instance.parent()
            {
                let _ = fs::remove_dir(parent);
            }
        }
    }
}

/// Removes the groups of programs that no longer run.
fn remove_tools(instance: &std::path::Path) {
    let entries = fs::read_dir(instance).into_iter().flatten().flatten();
    for entry in entries {
        if entry.file_name().to_string_lossy().starts_with(TOOL) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Returns the reasons why mounted cgroup hierarchies cannot be used.
#[must_use]
pub fn unusable_cgroups() -> Vec<String> {
    hierarchy::unusable(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

/// Kills all jailed processes of a slot and waits until they are gone. Used on hosts without
/// cgroups, where the processes of a sandbox are identified by the user IDs of its slot.
pub(crate) async fn kill_processes_of(slot: Slot) -> Result<(), CgroupError> {
    for uid in [slot.uid(), slot.exporter_uid()] {
        kill_processes_of_user(uid).await?;
    }
    Ok(())
}

async fn kill_processes_of_user(uid: u32) -> Result<(), CgroupError> {
    let find = || {
        let entries = fs::read_dir("/proc").map_err(cgroup_failed("list", "/proc".into()))?;
        let process = |entry: io::Result<fs::DirEntry>| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse::<i32>().ok()?;
            is_live_process_of(pid, uid).then_some(Pid::from_raw(pid))
        };
        Ok(entries.filter_map(process).collect())
    };
    kill_while_found(find).await
}

/// True if `pid` belongs to `uid` and is not a zombie. A zombie holds nothing but its process ID
/// until its parent reaps it.
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
                Err(error) => tracing::warn!(%pid, %error, "failed to kill a process"),
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
            // ENODEV: the group was removed while it was being read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => {}
            Err(error) => return Err(cgroup_failed("read", path)(error)),
        }
    }
    pids.sort_unstable();
    pids.dedup();
    Ok(pids.into_iter().map(Pid::from_raw).collect())
}

fn remove_group(dir: &PathBuf) -> Result<(), CgroupError> {
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(cgroup_failed("remove the cgroup", dir.clone())(error))
        }
        _ => Ok(()),
    }
}

fn cgroup_failed(step: &'static str, path: PathBuf) -> impl FnOnce(io::Error) -> CgroupError {
    move |source| CgroupError::Io { step, path, source }
}

#[cfg(test)]
mod tests;
