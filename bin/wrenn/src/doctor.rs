//! `wrenn doctor`: checks the capabilities of this machine, and prints the commands that fix
//! problems.
//!
//! [`examine`] is a pure function of the answers of a [`Machine`], so each finding is tested with a
//! simulated machine. Changes nothing on the machine; the virtual machine and the network namespace
//! that are created as probes are gone when it returns.

mod cgroups;
mod hardening;
mod machine;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use serde::Serialize;
use wrenn_agent::NetworkReport;
use wrenn_image::Recipe;
use wrenn_model::EMULATION_NOTE;
use wrenn_proto::supervise::Accel;

use crate::{accel::Decision, config::VmmChoice, nameservers::Nameservers, output, vmm};

pub(crate) use cgroups::Cgroups;
pub(crate) use hardening::Hardening;
pub(crate) use machine::ThisMachine;

/// Free disk space that an image build and a few sandboxes need, in bytes.
const MIN_DISK_BYTES: u64 = 4 << 30;

/// Free memory that one sandbox of the default size needs to start, in bytes.
const MIN_MEMORY_BYTES: u64 = 1 << 30;

/// Programs that sandboxes need, each with its Debian package.
const RUN_PROGRAMS: [(&str, &str); 4] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-storage-daemon", "qemu-system-common"),
    ("qemu-img", "qemu-utils"),
    ("nft", "nftables"),
];

/// Programs that `wrenn image build` runs, each with its Debian package.
const BUILD_PROGRAMS: [(&str, &str); 4] = [
    ("mmdebstrap", "mmdebstrap"),
    ("mkfs.ext4", "e2fsprogs"),
    ("tar", "tar"),
    ("dpkg-deb", "dpkg"),
];

/// Severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// No problem.
    Ok,
    /// Sandboxes run, but with limitations.
    Warn,
    /// Sandboxes cannot run.
    Fail,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// Name of the check.
    pub(crate) name: &'static str,
    /// Severity.
    pub(crate) level: Level,
    /// Description of the result.
    pub(crate) detail: String,
    /// Command that fixes the problem.
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

/// Properties of a machine that are checked.
pub(crate) trait Machine {
    /// True if this process runs as root.
    fn is_root(&self) -> bool;
    /// VMM and accelerator that guests would use.
    fn vmm(&self) -> vmm::Decision;
    /// CPU model that guests would have; the error is the reason why the VMM rejects it.
    fn cpu(&self) -> Result<String, String>;
    /// True if a program is installed.
    fn has_program(&self, name: &str) -> bool;
    /// Opens a device; the error is the reason of a failure.
    fn device(&self, path: &str) -> Result<(), String>;
    /// Available cgroup controllers.
    fn cgroups(&self) -> Cgroups;
    /// Creates a network namespace; the error is the reason of a failure.
    fn network_namespace(&self) -> Result<(), String>;
    /// Subnets of sandboxes, and firewalls that block their traffic; the error is the reason why
    /// that is unknown.
    fn network(&self) -> Result<NetworkReport, String>;
    /// Name servers for sandboxes.
    fn nameservers(&self) -> Nameservers;
    /// Free bytes where sandboxes are stored, with the directory that was checked.
    fn free_disk(&self) -> Result<(u64, String), String>;
    /// Available memory, in bytes.
    fn free_memory(&self) -> Result<u64, String>;
    /// Path of the library that pages guest memory; the error names the paths that were searched.
    fn paging_library(&self) -> Result<String, String>;
    /// Settings that weaken the isolation of guests.
    fn hardening(&self) -> Hardening;
    /// URL of the settings' object store, if it can be used; the error is the reason why not. `None`
    /// if the settings name none.
    fn object_store(&self) -> Option<Result<String, String>>;
    /// Names of the usable templates; the error describes damaged ones.
    fn templates(&self) -> Result<Vec<String>, String>;
    /// Templates whose creates boot instead of being restored, each with the reason.
    fn cold_templates(&self) -> Result<Vec<(String, String)>, String>;
}

/// Runs all checks.
pub(crate) fn examine(machine: &dyn Machine) -> Vec<Finding> {
    let templates = machine.templates();
    let built = templates.as_ref().is_ok_and(|names| !names.is_empty());
    // A machine that already has the images (for example, copied from another machine) does not
    // need the build tools.
    let build_level = if built { Level::Warn } else { Level::Fail };
    let network = machine.network();
    let vmm = machine.vmm();
    let mut findings = vec![
        root(machine),
        acceleration(vmm.accel.clone()),
        kvm_check(&vmm),
        firecracker(&vmm),
        guest_cpu(machine),
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
        subnets(&network),
        firewall(&network),
        nameservers(&machine.nameservers()),
        cgroup_limits(&machine.cgroups()),
        disk(machine),
        memory(machine),
        images(templates),
        template_snapshots(machine.cold_templates()),
    ];
    if vmm.firecracker.is_ok() {
        findings.push(device(
            machine,
            "fuse",
            "/dev/fuse",
            Level::Fail,
            "modprobe fuse",
        ));
    }
    findings.extend(machine.object_store().map(object_store));
    findings.extend(machine.hardening().findings());
    findings
}

fn root(machine: &dyn Machine) -> Finding {
    if machine.is_root() {
        return Finding::ok("root", "yes");
    }
    Finding::bad(
        Level::Fail,
        "root",
        "sandboxes require root (network namespaces, cgroups); without it, other checks may be wrong",
        "sudo wrenn doctor",
    )
}

fn acceleration(decision: Decision) -> Finding {
    let name = "acceleration";
    match (decision.accel, decision.no_kvm) {
        (Accel::Kvm, None) => Finding::ok(name, "kvm: hardware virtualization is available"),
        (Accel::Kvm, Some(why)) => Finding::bad(
            Level::Fail,
            name,
            format!("kvm is required by the settings, but {why}"),
            "unset WRENN_ACCEL  # or set it to tcg; check `accel` in the settings file too",
        ),
        (Accel::Tcg, None) => Finding::bad(
            Level::Warn,
            name,
            format!("tcg is set, but kvm is available and ten times as fast; {EMULATION_NOTE}"),
            "unset WRENN_ACCEL  # check `accel` in the settings file too",
        ),
        (Accel::Tcg, Some(why)) => {
            let fix = if why.contains("/dev/kvm") {
                "modprobe kvm_intel || modprobe kvm_amd"
            } else {
                "no command: enable virtualization in the firmware, or in the hypervisor if this is a VM"
            };
            let detail =
                format!("tcg, because {why}; everything works, but slower, and {EMULATION_NOTE}");
            Finding::bad(Level::Warn, name, detail, fix)
        }
    }
}

fn object_store(usable: Result<String, String>) -> Finding {
    let name = "object store";
    match usable {
        Ok(url) => Finding::ok(name, url),
        Err(why) => Finding::bad(
            Level::Fail,
            name,
            why,
            "env | grep -e WRENN_STORE -e AWS_  # see docs/object-store.md",
        ),
    }
}

/// Reports that KVM was not checked. A guest may then not boot.
fn kvm_check(decision: &vmm::Decision) -> Finding {
    let name = "kvm check";
    if decision.is_kvm_checked || decision.accel.accel == Accel::Tcg {
        return Finding::ok(name, "not switched off");
    }
    Finding::bad(
        Level::Warn,
        name,
        "switched off by the settings, so KVM is used although it may run no stock kernel",
        "unset WRENN_KVM_CHECK  # check `kvm_check` in the settings file too",
    )
}

/// Reports Firecracker: its version, or why it is not used. Without it, QEMU runs all guests.
fn firecracker(decision: &vmm::Decision) -> Finding {
    let name = "firecracker";
    match (&decision.firecracker, decision.choice) {
        (Ok(program), choice) => {
            let use_for = match choice {
                VmmChoice::Qemu => "only restores its own snapshots, because WRENN_VMM is qemu",
                VmmChoice::Auto | VmmChoice::Firecracker => "runs guests that boot",
            };
            let (path, version) = (program.path.display(), &program.version);
            Finding::ok(name, format!("{version} at {path}: {use_for}"))
        }
        (Err(why), VmmChoice::Firecracker) => Finding::bad(
            Level::Fail,
            name,
            format!("required by the settings and cannot be used: {why}"),
            "unset WRENN_VMM  # or set it to qemu; check `vmm` in the settings file too",
        ),
        (Err(why), VmmChoice::Auto | VmmChoice::Qemu) => {
            Finding::ok(name, format!("not used, so QEMU runs all guests: {why}"))
        }
    }
}

fn guest_cpu(machine: &dyn Machine) -> Finding {
    let name = "guest cpu";
    match machine.cpu() {
        Ok(model) => Finding::ok(name, model),
        Err(why) => Finding::bad(
            Level::Fail,
            name,
            why,
            "unset WRENN_CPU  # check `cpu` in the settings file too",
        ),
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
        Ok(()) => Finding::ok("network namespaces", "can be created"),
        Err(why) => Finding::bad(
            Level::Fail,
            "network namespaces",
            format!("cannot be created: {why}"),
            "sysctl -w user.max_net_namespaces=65536  # in a container: give it CAP_SYS_ADMIN",
        ),
    }
}

fn subnets(network: &Result<NetworkReport, String>) -> Finding {
    let name = "subnets";
    match network.as_ref().map(|report| &report.subnets) {
        Ok(Ok(subnets)) => Finding::ok(name, subnets.to_string()),
        Ok(Err(why)) => Finding::bad(
            Level::Fail,
            name,
            why.as_str(),
            "export WRENN_SUBNETS=10.11.0.0/16,10.12.0.0/16  # two ranges that this network does not use",
        ),
        Err(why) => Finding::bad(
            Level::Warn,
            name,
            why.as_str(),
            "ip -4 route show table all",
        ),
    }
}

fn firewall(network: &Result<NetworkReport, String>) -> Finding {
    let name = "firewall";
    match network.as_ref().map(|report| &report.obstacle) {
        Ok(Ok(None)) => Finding::ok(name, "does not block traffic of sandboxes"),
        Ok(Ok(Some(obstacle))) => Finding::bad(
            Level::Warn,
            name,
            format!("{} blocks sandboxes with network access", obstacle.what),
            obstacle.fix.as_str(),
        ),
        Ok(Err(why)) | Err(why) => {
            Finding::bad(Level::Warn, name, why.as_str(), "nft list ruleset")
        }
    }
}

fn nameservers(found: &Nameservers) -> Finding {
    let name = "name servers";
    let Nameservers { servers, source } = found;
    if servers.is_empty() {
        return Finding::bad(
            Level::Warn,
            name,
            format!("none in {source}: sandboxes cannot resolve names"),
            "export WRENN_DNS=ADDRESS  # of a name server",
        );
    }
    let text = |server: &IpAddr| match server {
        IpAddr::V4(server) if !server.is_loopback() => server.to_string(),
        // Also those on another address of this machine; the agent's log names them all.
        _ => format!("{server} (forwarded at the sandboxes' gateway)"),
    };
    let servers: Vec<_> = servers.iter().map(text).collect();
    Finding::ok(name, format!("{}, from {source}", servers.join(", ")))
}

fn cgroup_limits(cgroups: &Cgroups) -> Finding {
    let name = "cgroups";
    match cgroups.missing().as_slice() {
        [] => Finding::ok(name, cgroups.to_string()),
        missing => {
            let (level, effect) = match cgroups.required {
                true => (Level::Fail, "the service does not start"),
                false => (Level::Warn, "sandboxes run without these limits"),
            };
            let missing = missing.join(", ");
            if !cgroups.unusable.is_empty() {
                let why = cgroups.unusable.join("; ");
                let detail = format!("{missing} cannot be used ({why}): {effect}");
                let fix = "mount it writable, and move processes out of its root  # or WRENN_CGROUPS=optional, without limits";
                return Finding::bad(level, name, detail, fix);
            }
            let detail = format!("no controller for {missing}: {effect}");
            let fix = "mount -t cgroup2 cgroup2 /sys/fs/cgroup  # or WRENN_CGROUPS=optional, without limits";
            Finding::bad(level, name, detail, fix)
        }
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
                "{} at {dir}, at least {} required",
                output::bytes(free),
                output::bytes(MIN_DISK_BYTES)
            ),
            "export WRENN_DIR=/path/on/larger/disk  # or remove sandboxes or templates (wrenn sandbox ls; wrenn image ls)",
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
                "{}, at least {} required",
                output::bytes(free),
                output::bytes(MIN_MEMORY_BYTES)
            ),
            "wrenn sandbox rm ID  # for sandboxes that are no longer needed (wrenn sandbox ls)",
        ),
        Err(why) => Finding::bad(Level::Warn, name, why, "free -m"),
    }
}

/// Returns the built-in templates that are not in `names`.
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

fn template_snapshots(cold: Result<Vec<(String, String)>, String>) -> Finding {
    let name = "template snapshots";
    match cold {
        Ok(cold) if cold.is_empty() => Finding::ok(name, "every template can be restored"),
        Ok(cold) => {
            let reason = |(name, reason): &(String, String)| format!("`{name}`: {reason}");
            let reasons: Vec<_> = cold.iter().map(reason).collect();
            let names: Vec<_> = cold.iter().map(|(name, _)| name.as_str()).collect();
            Finding::bad(
                Level::Warn,
                name,
                format!(
                    "creates boot from disk, which takes seconds: {}",
                    reasons.join("; ")
                ),
                format!("wrenn image build {}", names.join(" ")),
            )
        }
        Err(why) => Finding::bad(Level::Warn, name, why, "wrenn image build"),
    }
}

/// Formats the report as lines; levels are colored if `colour`.
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

/// True if sandboxes can run.
pub(crate) fn healthy(findings: &[Finding]) -> bool {
    findings.iter().all(|f| f.level != Level::Fail)
}
