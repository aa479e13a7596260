//! `wrenn doctor`: what this machine can do, what it lacks, and the command that mends it.
//!
//! [`examine`] is a pure function of what a [`Machine`] answers, so each finding is tested with a made-up machine. Changes
//! nothing on the machine; what it makes to find out (a virtual machine, a network namespace) is gone when it returns.

mod cgroups;
mod machine;
#[cfg(test)]
mod tests;

use serde::Serialize;
use wrenn_image::Recipe;
use wrenn_proto::supervise::Accel;

use crate::{accel::Decision, output};

pub(crate) use cgroups::Cgroups;
pub(crate) use machine::ThisMachine;

/// Free space that an image build and a few sandboxes need, bytes.
const MIN_DISK_BYTES: u64 = 4 << 30;

/// Free memory below which not even one sandbox of the usual size starts, bytes.
const MIN_MEMORY_BYTES: u64 = 1 << 30;

/// Programs without which no sandbox runs, each with its Debian package.
const RUN_PROGRAMS: [(&str, &str); 3] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("nft", "nftables"),
];

/// Programs that `wrenn image build` calls, each with its Debian package.
const BUILD_PROGRAMS: [(&str, &str); 4] = [
    ("mmdebstrap", "mmdebstrap"),
    ("mkfs.ext4", "e2fsprogs"),
    ("tar", "tar"),
    ("dpkg-deb", "dpkg"),
];

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// Good.
    Ok,
    /// It works, but worse than it could.
    Warn,
    /// Sandboxes cannot run.
    Fail,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// What was looked at.
    pub(crate) name: &'static str,
    /// How it is.
    pub(crate) level: Level,
    /// In words.
    pub(crate) detail: String,
    /// The command that mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fix: Option<String>,
}

impl Finding {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            level: Level::Ok,
            detail: detail.into(),
            fix: None,
        }
    }

    fn bad(
        level: Level,
        name: &'static str,
        detail: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            name,
            level,
            detail: detail.into(),
            fix: Some(fix.into()),
        }
    }
}

/// What can be asked of a machine.
pub(crate) trait Machine {
    /// Whether this process has the rights of root.
    fn is_root(&self) -> bool;
    /// How guest code would run.
    fn accel(&self) -> Decision;
    /// Whether a program is found.
    fn has_program(&self, name: &str) -> bool;
    /// Whether a device can be opened; the error says why not.
    fn device(&self, path: &str) -> Result<(), String>;
    /// Where the limits of CPU and memory can be set.
    fn cgroups(&self) -> Cgroups;
    /// Whether a network namespace can be made; the error says why not.
    fn network_namespace(&self) -> Result<(), String>;
    /// Free bytes where sandboxes are stored, with the directory that was asked.
    fn free_disk(&self) -> Result<(u64, String), String>;
    /// Free bytes of memory.
    fn free_memory(&self) -> Result<u64, String>;
    /// Where the library is that pages a guest's memory; the error says where it was sought.
    fn paging_library(&self) -> Result<String, String>;
    /// Names of the templates that can be used; the error says what is wrong with them.
    fn templates(&self) -> Result<Vec<String>, String>;
}

/// Looks at everything.
pub(crate) fn examine(machine: &dyn Machine) -> Vec<Finding> {
    let templates = machine.templates();
    let built = templates.as_ref().is_ok_and(|names| !names.is_empty());
    // Who has the images already (copied from another machine, say) does not need what builds them.
    let build_level = if built { Level::Warn } else { Level::Fail };
    vec![
        root(machine),
        acceleration(machine.accel()),
        programs(machine, "programs to run", Level::Fail, &RUN_PROGRAMS),
        programs(machine, "programs to build", build_level, &BUILD_PROGRAMS),
        device(
            machine,
            "tap devices",
            "/dev/net/tun",
            Level::Fail,
            "modprobe tun",
        ),
        device(
            machine,
            "userfaultfd",
            "/dev/userfaultfd",
            Level::Fail,
            "mknod -m 600 /dev/userfaultfd c 10 $(awk '$2 == \"userfaultfd\" {print $1}' /proc/misc)",
        ),
        paging_library(machine),
        network_namespace(machine),
        cgroup_limits(&machine.cgroups()),
        disk(machine),
        memory(machine),
        images(templates),
    ]
}

fn root(machine: &dyn Machine) -> Finding {
    if machine.is_root() {
        return Finding::ok("root", "yes");
    }
    Finding::bad(
        Level::Fail,
        "root",
        "sandboxes need root (network namespaces, cgroups); some lines below may be wrong without it",
        "sudo wrenn doctor",
    )
}

fn acceleration(decision: Decision) -> Finding {
    let name = "acceleration";
    match (decision.accel, decision.no_kvm) {
        (Accel::Kvm, None) => Finding::ok(name, "kvm: hardware virtualization works"),
        (Accel::Kvm, Some(why)) => Finding::bad(
            Level::Fail,
            name,
            format!("kvm is asked for, but {why}"),
            "unset WRENN_ACCEL  # or set it to tcg, and look for `accel` in the settings file",
        ),
        (Accel::Tcg, None) => Finding::bad(
            Level::Warn,
            name,
            "tcg: software emulation is asked for, but kvm works here and is ten times as fast",
            "unset WRENN_ACCEL  # and look for `accel` in the settings file",
        ),
        (Accel::Tcg, Some(why)) => {
            let fix = if why.contains("/dev/kvm") {
                "modprobe kvm_intel || modprobe kvm_amd"
            } else {
                "no command: switch virtualization on in the firmware, or for this machine in the hypervisor it runs on"
            };
            let detail = format!("tcg: software emulation, because {why}; all works, but slower");
            Finding::bad(Level::Warn, name, detail, fix)
        }
    }
}

fn programs(
    machine: &dyn Machine,
    name: &'static str,
    level: Level,
    wanted: &[(&str, &str)],
) -> Finding {
    let missing: Vec<&(&str, &str)> = wanted
        .iter()
        .filter(|(program, _)| !machine.has_program(program))
        .collect();
    let list = |pick: fn(&&(&str, &str)) -> String, from: &[&(&str, &str)]| {
        from.iter().map(pick).collect::<Vec<_>>().join(" ")
    };
    if missing.is_empty() {
        let all: Vec<&(&str, &str)> = wanted.iter().collect();
        return Finding::ok(name, list(|p| p.0.to_owned(), &all));
    }
    Finding::bad(
        level,
        name,
        format!("missing: {}", list(|p| p.0.to_owned(), &missing)),
        format!(
            "apt-get update && apt-get install -y --no-install-recommends {}",
            list(|p| p.1.to_owned(), &missing)
        ),
    )
}

fn device(
    machine: &dyn Machine,
    name: &'static str,
    path: &str,
    level: Level,
    fix: &str,
) -> Finding {
    match machine.device(path) {
        Ok(()) => Finding::ok(name, path),
        Err(why) => Finding::bad(level, name, format!("{path}: {why}"), fix),
    }
}

fn paging_library(machine: &dyn Machine) -> Finding {
    match machine.paging_library() {
        Ok(path) => Finding::ok("paging library", path),
        Err(why) => Finding::bad(Level::Fail, "paging library", why, "make build install"),
    }
}

fn network_namespace(machine: &dyn Machine) -> Finding {
    match machine.network_namespace() {
        Ok(()) => Finding::ok("network namespaces", "can be made"),
        Err(why) => Finding::bad(
            Level::Fail,
            "network namespaces",
            format!("cannot be made: {why}"),
            "sysctl -w user.max_net_namespaces=65536  # in a container: give it CAP_SYS_ADMIN",
        ),
    }
}

fn cgroup_limits(cgroups: &Cgroups) -> Finding {
    let name = "cgroups";
    match cgroups.missing().as_slice() {
        [] => Finding::ok(name, cgroups.to_string()),
        missing => Finding::bad(
            Level::Warn,
            name,
            format!(
                "no controller for {}: sandboxes run without that limit",
                missing.join(", ")
            ),
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        ),
    }
}

fn disk(machine: &dyn Machine) -> Finding {
    let name = "free disk";
    match machine.free_disk() {
        Ok((free, dir)) if free >= MIN_DISK_BYTES => {
            Finding::ok(name, format!("{} at {dir}", output::bytes(free)))
        }
        Ok((free, dir)) => Finding::bad(
            Level::Fail,
            name,
            format!(
                "{} at {dir}, at least {} are needed",
                output::bytes(free),
                output::bytes(MIN_DISK_BYTES)
            ),
            "export WRENN_DIR=/a/larger/disk  # or: wrenn sandbox ls; wrenn image ls; and remove some",
        ),
        Err(why) => Finding::bad(Level::Warn, name, why, "df -h"),
    }
}

fn memory(machine: &dyn Machine) -> Finding {
    let name = "free memory";
    match machine.free_memory() {
        Ok(free) if free >= MIN_MEMORY_BYTES => Finding::ok(name, output::bytes(free)),
        Ok(free) => Finding::bad(
            Level::Fail,
            name,
            format!(
                "{}, at least {} are needed",
                output::bytes(free),
                output::bytes(MIN_MEMORY_BYTES)
            ),
            "wrenn sandbox ls  # and remove what is not needed: wrenn sandbox rm ID",
        ),
        Err(why) => Finding::bad(Level::Warn, name, why, "free -m"),
    }
}

/// Templates that are known and not among these.
fn not_built(names: &[String]) -> Vec<&'static str> {
    let known = Recipe::ALL.map(|recipe| recipe.name);
    let is_missing = |known: &&str| !names.iter().any(|name| name == known);
    known.into_iter().filter(is_missing).collect()
}

fn images(templates: Result<Vec<String>, String>) -> Finding {
    let name = "images";
    match templates {
        Ok(names) => {
            let missing = not_built(&names);
            if missing.is_empty() {
                return Finding::ok(name, format!("templates: {}", names.join(" ")));
            }
            let missing = missing.join(" ");
            Finding::bad(
                Level::Warn,
                name,
                format!("not built yet: {missing}"),
                format!("wrenn image build {missing}"),
            )
        }
        Err(why) => Finding::bad(Level::Warn, name, why, "wrenn image build"),
    }
}

/// The report as lines; words are coloured if `colour`.
pub(crate) fn render(findings: &[Finding], colour: bool) -> String {
    let width = findings.iter().map(|f| f.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let (word, paint) = match finding.level {
            Level::Ok => ("ok  ", "\x1b[32m"),
            Level::Warn => ("warn", "\x1b[33m"),
            Level::Fail => ("fail", "\x1b[31m"),
        };
        let word = if colour {
            format!("{paint}{word}\x1b[0m")
        } else {
            word.to_owned()
        };
        text.push_str(&format!(
            "{word}  {:width$}  {}\n",
            finding.name, finding.detail
        ));
        if let Some(fix) = &finding.fix {
            text.push_str(&format!("      {:width$}  → {fix}\n", ""));
        }
    }
    text
}

/// Whether sandboxes can run.
pub(crate) fn healthy(findings: &[Finding]) -> bool {
    findings.iter().all(|f| f.level != Level::Fail)
}
