//! Cgroup hierarchies of this host, and the limit files of each cgroup version.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{CommonLimits, Limits, io_limit::IoLimit};

/// Parent directory of all agents' groups in a hierarchy.
const ROOT: &str = "wrenn";

/// Period of the CPU quota, in microseconds. Equal to the kernel's default.
const PERIOD_US: u64 = 100_000;

/// CPU weight of a group whose guest's kernel boots, in multiples of the default.
const BOOT_PRIORITY: u64 = 5;

/// Default `cpu.weight` of cgroup v2.
const DEFAULT_WEIGHT: u64 = 100;

/// Maximum `cpu.weight` of cgroup v2.
const MAX_WEIGHT: u64 = 10_000;

/// Default `cpu.shares` of cgroup v1.
const DEFAULT_SHARES: u64 = 1024;

/// Maximum `cpu.shares` of cgroup v1.
const MAX_SHARES: u64 = 262_144;

/// Cgroup controllers that limit sandboxes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Controller {
    Memory,
    Cpu,
    Pids,
    Io,
}

impl Controller {
    const ALL: [Self; 4] = [Self::Memory, Self::Cpu, Self::Pids, Self::Io];

    /// Controllers without which a sandbox has no limits worth the name. QEMU limits the disk
    /// requests of its guest itself.
    pub(super) const REQUIRED: [Self; 3] = [Self::Memory, Self::Cpu, Self::Pids];

    pub(super) const fn name(self, unified: bool) -> &'static str {
        match (self, unified) {
            (Self::Memory, _) => "memory",
            (Self::Cpu, _) => "cpu",
            (Self::Pids, _) => "pids",
            (Self::Io, true) => "io",
            (Self::Io, false) => "blkio",
        }
    }
}

/// Value to write to a file of a group.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) file: &'static str,
    pub(super) value: String,
    /// True if the kernel may lack the file, or the device may not support the limit.
    pub(super) is_optional: bool,
}

/// Mounted cgroup tree, with those of its controllers that limit sandboxes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hierarchy {
    mount: PathBuf,
    unified: bool,
    controllers: Vec<Controller>,
}

/// Finds the usable hierarchies with a needed controller in the text of `/proc/self/mountinfo`.
pub(super) fn detect(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found = mounted(mountinfo);
    found.retain(|hierarchy| {
        let usable = hierarchy.try_use();
        if let Err(error) = &usable {
            tracing::warn!(mount = %hierarchy.mount.display(), controllers = ?hierarchy.controllers, %error,
                "cgroup hierarchy unusable, its limits are not applied");
        }
        usable.is_ok()
    });
    found
}

/// Finds the hierarchies with a needed controller.
fn mounted(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    let mut missing = Controller::ALL.to_vec();
    for mount in mountinfo.lines().filter_map(parse_mount) {
        let here: Vec<Controller> = missing
            .iter()
            .copied()
            .filter(|c| {
                mount
                    .controllers
                    .iter()
                    .any(|name| name == c.name(mount.unified))
            })
            .collect();
        if here.is_empty() {
            continue;
        }
        missing.retain(|c| !here.contains(c));
        found.push(Hierarchy {
            mount: mount.path,
            unified: mount.unified,
            controllers: here,
        });
    }
    found
}

/// Returns the reasons why hierarchies of this host that have a needed controller cannot be used.
pub(super) fn unusable(mountinfo: &str) -> Vec<String> {
    let reason = |hierarchy: Hierarchy| {
        let error = hierarchy.try_use().err()?;
        Some(format!("{}: {error}", hierarchy.mount.display()))
    };
    mounted(mountinfo).into_iter().filter_map(reason).collect()
}

struct Mount {
    path: PathBuf,
    unified: bool,
    controllers: Vec<String>,
}

/// Parses a line `id parent dev root path options [tags] - type source super-options`
/// (`proc_pid_mountinfo(5)`).
fn parse_mount(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let path = PathBuf::from(before.split(' ').nth(4)?.replace("\\040", " "));
    let mut after = after.split(' ');
    let kind = after.next()?;
    let super_options = after.nth(1)?;
    match kind {
        "cgroup" => Some(Mount {
            path,
            unified: false,
            controllers: super_options.split(',').map(str::to_owned).collect(),
        }),
        "cgroup2" => {
            let available = fs::read_to_string(path.join("cgroup.controllers")).ok()?;
            Some(Mount {
                path,
                unified: true,
                controllers: available.split_whitespace().map(str::to_owned).collect(),
            })
        }
        _ => None,
    }
}

impl Hierarchy {
    /// Returns the directory of one agent's groups.
    pub(super) fn instance_dir(&self, instance: &str) -> PathBuf {
        self.mount.join(ROOT).join(instance)
    }

    /// Creates a sandbox's group and any missing parents. All groups of the instance together may
    /// use `memory_bytes`.
    pub(super) fn create(
        &self,
        instance: &str,
        name: &str,
        memory_bytes: u64,
    ) -> io::Result<PathBuf> {
        let dir = self.instance_dir(instance).join(name);
        // Another agent may remove the parents, with its last sandbox, between two steps.
        for attempt in 0.. {
            match self.try_create(instance, &dir, memory_bytes) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && attempt < 10 => {}
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        Ok(dir)
    }

    fn try_create(&self, instance: &str, dir: &Path, memory_bytes: u64) -> io::Result<()> {
        let parents = [
            self.mount.clone(),
            self.mount.join(ROOT),
            self.instance_dir(instance),
        ];
        for parent in &parents {
            make_dir_if_missing(parent)?;
            if self.unified {
                self.delegate(parent)?;
            }
        }
        self.weigh_all(&self.mount.join(ROOT));
        self.limit_all(&self.instance_dir(instance), memory_bytes);
        make_dir_if_missing(dir)
    }

    /// Gives all sandboxes together the weight of one process per processor. With the default
    /// weight, they would compete with the processes of the host as if they were one of them, and a
    /// booting kernel would miss its timer. A weight that the operator has set is kept. A failure
    /// is logged.
    fn weigh_all(&self, dir: &Path) {
        if !self.has(Controller::Cpu) {
            return;
        }
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let Setting { file, value, .. } = self.common_weight(processors as u64);
        let default = if self.unified {
            DEFAULT_WEIGHT
        } else {
            DEFAULT_SHARES
        };
        let path = dir.join(file);
        let is_default =
            fs::read_to_string(&path).is_ok_and(|text| text.trim() == default.to_string());
        if is_default && let Err(error) = fs::write(&path, value) {
            tracing::warn!(path = %path.display(), %error, "failed to set the CPU weight of all sandboxes");
        }
    }

    /// Returns the weight of all sandboxes together, at most what the kernel accepts.
    fn common_weight(&self, processors: u64) -> Setting {
        match self.unified {
            true => setting("cpu.weight", (DEFAULT_WEIGHT * processors).min(MAX_WEIGHT)),
            false => setting("cpu.shares", (DEFAULT_SHARES * processors).min(MAX_SHARES)),
        }
    }

    /// Limits the memory of all groups of an instance together. A failure is logged: each group has
    /// a limit of its own, and v1 rejects a limit below the present use.
    fn limit_all(&self, dir: &Path, memory_bytes: u64) {
        let file = match (self.controllers.contains(&Controller::Memory), self.unified) {
            (false, _) => return,
            (true, true) => "memory.max",
            (true, false) => "memory.limit_in_bytes",
        };
        let (path, limit) = (dir.join(file), memory_bytes.to_string());
        // Written once, because a write makes the kernel check the use of all children.
        let is_set = fs::read_to_string(&path).is_ok_and(|text| text.trim() == limit);
        if !is_set && let Err(error) = fs::write(&path, &limit) {
            tracing::warn!(path = %path.display(), %error, "failed to limit the memory of all sandboxes");
        }
    }

    /// Enables the controllers for the children of `parent`. On v2, `cgroup.subtree_control` of a
    /// group names the controllers of its children.
    fn delegate(&self, parent: &Path) -> io::Result<()> {
        let file = parent.join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&file).unwrap_or_default();
        for controller in &self.controllers {
            let name = controller.name(self.unified);
            if !enabled.split_whitespace().any(|c| c == name) {
                fs::write(&file, format!("+{name}"))?;
            }
        }
        Ok(())
    }

    /// True if this hierarchy has a controller.
    pub(super) fn has(&self, controller: Controller) -> bool {
        self.controllers.contains(&controller)
    }

    /// Checks that groups can be created in this hierarchy. Fails for a tree that is mounted
    /// read-only, for example in a container.
    fn try_use(&self) -> io::Result<()> {
        let name = format!("wrenn-probe-{}", std::process::id());
        let probe = self.mount.join(name);
        if self.unified {
            self.delegate(&self.mount)?;
        }
        fs::create_dir(&probe)?;
        let _ = fs::remove_dir(&probe);
        Ok(())
    }

    /// Returns what to write for a group whose guest's kernel boots, or no longer does.
    ///
    /// A booting kernel measures its timer; a pause of its virtual CPU falsifies the result
    /// (`bin/init/src/timer.rs`). So the group has no CPU quota and [`BOOT_PRIORITY`] times the
    /// default weight while a kernel boots.
    pub(super) fn boot_settings(&self, limits: Limits, booting: bool) -> Vec<Setting> {
        if !self.controllers.contains(&Controller::Cpu) {
            return Vec::new();
        }
        let factor = if booting { BOOT_PRIORITY } else { 1 };
        let quota_us = limits.cpu_percent * PERIOD_US / 100;
        match (self.unified, booting) {
            (true, true) => vec![
                setting("cpu.weight", DEFAULT_WEIGHT * factor),
                setting("cpu.max", format!("max {PERIOD_US}")),
            ],
            (true, false) => vec![
                setting("cpu.weight", DEFAULT_WEIGHT),
                setting("cpu.max", format!("{quota_us} {PERIOD_US}")),
            ],
            (false, true) => vec![
                setting("cpu.shares", DEFAULT_SHARES * factor),
                setting("cpu.cfs_quota_us", -1),
            ],
            (false, false) => vec![
                setting("cpu.shares", DEFAULT_SHARES),
                setting("cpu.cfs_quota_us", quota_us),
            ],
        }
    }

    /// Returns the limits to write to a new group.
    pub(super) fn settings(&self, limits: Limits, common: &CommonLimits) -> Vec<Setting> {
        let Limits {
            memory_bytes,
            cpu_percent,
            threads,
        } = limits;
        let swap_bytes = common.swap_bytes;
        let quota_us = cpu_percent * PERIOD_US / 100;
        let of = |controller: &Controller| match (self.unified, controller) {
            (true, Controller::Memory) => vec![
                setting("memory.max", memory_bytes),
                // The OOM killer must kill the whole sandbox: a partial VMM is useless.
                setting("memory.oom.group", 1),
                optional("memory.swap.max", swap_bytes),
            ],
            (true, Controller::Cpu) => vec![setting("cpu.max", format!("{quota_us} {PERIOD_US}"))],
            (false, Controller::Memory) => vec![
                setting("memory.limit_in_bytes", memory_bytes),
                // Memory and swap together. Absent unless the kernel counts swap.
                optional("memory.memsw.limit_in_bytes", memory_bytes + swap_bytes),
            ],
            (false, Controller::Cpu) => vec![
                setting("cpu.cfs_period_us", PERIOD_US),
                setting("cpu.cfs_quota_us", quota_us),
            ],
            (_, Controller::Pids) => vec![setting("pids.max", threads)],
            (unified, Controller::Io) => io_settings(unified, common.io.as_ref()),
        };
        self.controllers.iter().flat_map(of).collect()
    }
}

fn setting(file: &'static str, value: impl ToString) -> Setting {
    Setting {
        file,
        value: value.to_string(),
        is_optional: false,
    }
}

fn optional(file: &'static str, value: impl ToString) -> Setting {
    Setting {
        is_optional: true,
        ..setting(file, value)
    }
}

fn io_settings(unified: bool, limit: Option<&IoLimit>) -> Vec<Setting> {
    let Some(limit) = limit else {
        return Vec::new();
    };
    if unified {
        return vec![optional("io.max", limit.v2())];
    }
    let files = [
        ("blkio.throttle.read_bps_device", limit.bytes),
        ("blkio.throttle.write_bps_device", limit.bytes),
        ("blkio.throttle.read_iops_device", limit.ops),
        ("blkio.throttle.write_iops_device", limit.ops),
    ];
    let limited = files.into_iter().filter(|(_, value)| *value > 0);
    limited
        .map(|(file, value)| optional(file, format!("{} {value}", limit.device)))
        .collect()
}

fn make_dir_if_missing(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const V1: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / @/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / @/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / @/systemd rw,relatime - cgroup cgroup rw,name=systemd
39 31 0:36 / @/pids rw,relatime shared:4 - cgroup cgroup rw,pids
41 31 0:38 / @/unified rw,relatime - cgroup2 cgroup2 rw";

    fn tree(directories: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for dir in directories {
            fs::create_dir(root.path().join(dir)).unwrap();
        }
        root
    }

    fn mountinfo(text: &str, root: &Path) -> String {
        text.replace('@', root.to_str().unwrap())
    }

    #[test]
    fn v1_has_one_hierarchy_per_controller() {
        let root = tree(&["cpu", "memory", "systemd", "pids", "unified"]);
        fs::write(root.path().join("unified/cgroup.controllers"), "").unwrap();
        let found = detect(&mountinfo(V1, root.path()));
        let names: Vec<_> = found
            .iter()
            .map(|h| {
                (
                    h.mount.file_name().unwrap().to_str().unwrap(),
                    h.controllers.clone(),
                )
            })
            .collect();
        assert_eq!(
            names,
            [
                ("cpu", vec![Controller::Cpu]),
                ("memory", vec![Controller::Memory]),
                ("pids", vec![Controller::Pids])
            ]
        );
    }

    #[test]
    fn v2_enables_its_controllers_on_the_way_down() {
        let root = tree(&["unified"]);
        let mount = root.path().join("unified");
        fs::write(
            mount.join("cgroup.controllers"),
            "cpuset cpu io memory pids\n",
        )
        .unwrap();
        let found = detect(&mountinfo(V1.lines().last().unwrap(), root.path()));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].controllers, Controller::ALL);
        let dir = found[0].create("0123", "sb-1", 1 << 30).unwrap();
        assert_eq!(dir, mount.join("wrenn/0123/sb-1"));
        let limit = fs::read_to_string(mount.join("wrenn/0123/memory.max")).unwrap();
        assert_eq!(limit, (1_u64 << 30).to_string());
        for parent in [&mount, &mount.join("wrenn"), &mount.join("wrenn/0123")] {
            // The kernel's file accumulates writes; a regular file keeps only the last.
            assert!(parent.join("cgroup.subtree_control").exists(), "{parent:?}");
        }
    }

    #[test]
    fn a_hierarchy_that_cannot_be_written_is_not_used() {
        let root = tree(&["cpu", "systemd", "pids", "unified"]);
        // The directory `memory` is missing. This stands in for a read-only mount, because root
        // could still write to a read-only plain directory.
        let found = detect(&mountinfo(V1, root.path()));
        assert!(found.iter().all(|h| h.controllers != [Controller::Memory]));
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn a_booting_kernel_has_priority_and_no_quota() {
        let limits = Limits::for_guest(crate::cgroup::tests::size(512, 1));
        let text = |unified, booting| {
            let hierarchy = Hierarchy {
                mount: PathBuf::new(),
                unified,
                controllers: vec![Controller::Cpu],
            };
            let settings = hierarchy.boot_settings(limits, booting);
            let lines = settings.iter().map(|s| format!("{}={}", s.file, s.value));
            lines.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(text(true, true), "cpu.weight=500 cpu.max=max 100000");
        assert_eq!(text(true, false), "cpu.weight=100 cpu.max=125000 100000");
        assert_eq!(text(false, true), "cpu.shares=5120 cpu.cfs_quota_us=-1");
        assert_eq!(
            text(false, false),
            "cpu.shares=1024 cpu.cfs_quota_us=125000"
        );
    }

    #[test]
    fn all_sandboxes_together_weigh_as_one_process_per_processor() {
        let root = tree(&["cpu"]);
        let mut hierarchy = Hierarchy {
            mount: root.path().to_owned(),
            unified: false,
            controllers: vec![Controller::Cpu],
        };
        let weight = |h: &Hierarchy, processors| h.common_weight(processors).value;
        assert_eq!(weight(&hierarchy, 4), "4096");
        assert_eq!(weight(&hierarchy, 1000), "262144");
        // The kernel creates the file with the group.
        let shares = root.path().join("cpu/cpu.shares");
        let processors = std::thread::available_parallelism().unwrap().get() as u64;
        for (before, after) in [
            ("1024\n", weight(&hierarchy, processors)),
            ("77\n", "77\n".into()),
        ] {
            fs::write(&shares, before).unwrap();
            hierarchy.weigh_all(&root.path().join("cpu"));
            assert_eq!(fs::read_to_string(&shares).unwrap(), after);
        }
        hierarchy.unified = true;
        assert_eq!(weight(&hierarchy, 4), "400");
        assert_eq!(weight(&hierarchy, 1000), "10000");
    }

    #[test]
    fn limits_have_the_format_of_each_version() {
        let limits = Limits::for_guest(crate::cgroup::tests::size(512, 2));
        let hierarchy = |unified| Hierarchy {
            mount: PathBuf::new(),
            unified,
            controllers: Controller::ALL.to_vec(),
        };
        let text = |unified| {
            let common = CommonLimits {
                memory_bytes: 1 << 30,
                swap_bytes: 1 << 20,
                io: Some(IoLimit {
                    device: "8:0".to_owned(),
                    bytes: 5,
                    ops: 7,
                }),
            };
            let settings = hierarchy(unified).settings(limits, &common);
            let lines: Vec<_> = settings
                .iter()
                .map(|s| format!("{}={}", s.file, s.value))
                .collect();
            lines.join(" ")
        };
        assert_eq!(
            text(true),
            "memory.max=805306368 memory.oom.group=1 memory.swap.max=1048576 \
             cpu.max=225000 100000 pids.max=130 io.max=8:0 rbps=5 wbps=5 riops=7 wiops=7"
        );
        assert_eq!(
            text(false),
            "memory.limit_in_bytes=805306368 memory.memsw.limit_in_bytes=806354944 \
             cpu.cfs_period_us=100000 cpu.cfs_quota_us=225000 pids.max=130 \
             blkio.throttle.read_bps_device=8:0 5 blkio.throttle.write_bps_device=8:0 5 \
             blkio.throttle.read_iops_device=8:0 7 blkio.throttle.write_iops_device=8:0 7"
        );
    }
}
