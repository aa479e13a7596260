//! Settings of the host that weaken the isolation of guests: those that Firecracker's guide for
//! production hosts lists.
//!
//! They do not prevent sandboxes from running, so each finding is a warning. What the kernel does
//! not report, for example in a container, is not judged.

use std::{fs, path::Path};

use super::{Finding, Level};

/// Settings of a host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Hardening {
    /// True if two hardware threads of one core run at the same time.
    pub(crate) smt: Option<bool>,
    /// True if the kernel merges equal pages of different processes.
    pub(crate) ksm: Option<bool>,
    /// Kernel module of KVM that permits nested virtualization.
    pub(crate) nested: Option<String>,
    /// True if the host has swap.
    pub(crate) swap: Option<bool>,
    /// Revision of the processor's microcode.
    pub(crate) microcode: Option<String>,
    /// Defects of the processor that are not mitigated, each with the kernel's description.
    pub(crate) vulnerable: Vec<String>,
    /// True if the kernel was started without mitigations.
    pub(crate) mitigations_off: bool,
}

impl Hardening {
    /// Reads the settings of this host below `root`, which is `/` except in tests.
    pub(crate) fn read(root: &Path) -> Self {
        let text = |path: &str| {
            let text = fs::read_to_string(root.join(path)).ok()?;
            Some(text.trim().to_owned())
        };
        let nested = |module: &&str| {
            let path = format!("sys/module/{module}/parameters/nested");
            text(&path).is_some_and(|value| value == "Y" || value == "1")
        };
        Self {
            smt: text("sys/devices/system/cpu/smt/active").map(|active| active == "1"),
            ksm: text("sys/kernel/mm/ksm/run").map(|run| run != "0"),
            nested: ["kvm_intel", "kvm_amd"]
                .iter()
                .find(|m| nested(m))
                .map(|m| (*m).to_owned()),
            // The first line contains the names of the columns.
            swap: text("proc/swaps").map(|swaps| swaps.lines().count() > 1),
            microcode: text("proc/cpuinfo").and_then(|info| microcode(&info)),
            vulnerable: vulnerable(&root.join("sys/devices/system/cpu/vulnerabilities")),
            mitigations_off: text("proc/cmdline").is_some_and(|line| {
                line.split_whitespace()
                    .any(|word| word == "mitigations=off")
            }),
        }
    }

    /// Returns the findings.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        vec![
            self.smt(),
            self.ksm(),
            self.nested(),
            self.swap(),
            self.microcode(),
            self.mitigations(),
        ]
    }

    fn smt(&self) -> Finding {
        judge(
            "smt",
            self.smt,
            "off",
            "on: guests on two threads of one core can observe each other",
            "echo off > /sys/devices/system/cpu/smt/control  # or `nosmt` on the kernel's command line",
        )
    }

    fn ksm(&self) -> Finding {
        judge(
            "ksm",
            self.ksm,
            "off",
            "on: a guest can find out by timing what other guests have in memory",
            "echo 0 > /sys/kernel/mm/ksm/run",
        )
    }

    fn nested(&self) -> Finding {
        match &self.nested {
            None => Finding::ok("nested kvm", "off"),
            Some(module) => Finding::bad(
                Level::Warn,
                "nested kvm",
                "on: more code of KVM can be reached by guests whose CPU model has vmx or svm",
                format!("modprobe -r {module} && modprobe {module} nested=0"),
            ),
        }
    }

    fn swap(&self) -> Finding {
        judge(
            "swap",
            self.swap,
            "none",
            "in use: memory of guests may be written to disk, where it stays",
            "swapoff -a  # and remove it from /etc/fstab, or encrypt it",
        )
    }

    fn microcode(&self) -> Finding {
        let name = "microcode";
        let lacks = |text: &&String| {
            text.starts_with("old_microcode:") || text.to_lowercase().contains("no microcode")
        };
        match self.vulnerable.iter().find(lacks) {
            Some(text) => Finding::bad(
                Level::Warn,
                name,
                format!("outdated: {text}"),
                "apt-get install intel-microcode || apt-get install amd64-microcode  # then reboot",
            ),
            None => {
                let revision = self.microcode.as_deref().unwrap_or("not reported");
                Finding::ok(name, format!("{revision}; the kernel misses none"))
            }
        }
    }

    fn mitigations(&self) -> Finding {
        let name = "cpu mitigations";
        let fix = "apt-get upgrade linux-image-amd64  # then reboot; see /sys/devices/system/cpu/vulnerabilities";
        if self.mitigations_off {
            let fix = "remove `mitigations=off` from the kernel's command line and reboot";
            return Finding::bad(Level::Warn, name, "switched off", fix);
        }
        if self.vulnerable.is_empty() {
            return Finding::ok(name, "no defect without mitigation is reported");
        }
        let detail = format!("missing: {}", self.vulnerable.join("; "));
        Finding::bad(Level::Warn, name, detail, fix)
    }
}

/// Returns the finding about a setting that should be off.
fn judge(name: &'static str, is_on: Option<bool>, off: &str, on: &str, fix: &str) -> Finding {
    match is_on {
        None => Finding::ok(name, "not reported by the kernel"),
        Some(false) => Finding::ok(name, off),
        Some(true) => Finding::bad(Level::Warn, name, on, fix),
    }
}

/// Returns the revision of the first processor's microcode in `/proc/cpuinfo`.
fn microcode(cpuinfo: &str) -> Option<String> {
    let mut fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    let (_, revision) = fields.find(|(name, _)| name.trim() == "microcode")?;
    Some(revision.trim().to_owned())
}

/// Returns the defects in the directory that the kernel describes as vulnerable, in order.
fn vulnerable(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<String> = entries
        .filter_map(|entry| {
            let text = fs::read_to_string(entry.path()).ok()?;
            let text = text.trim();
            // "Mitigation: …; SMT vulnerable" is the finding about SMT.
            let starts = ["Vulnerable", "KVM: Vulnerable"];
            let is_vulnerable = starts.iter().any(|start| text.starts_with(start))
                || text.contains("VMX: vulnerable");
            is_vulnerable.then(|| format!("{}: {text}", entry.file_name().to_string_lossy()))
        })
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Creates the files of a simulated host.
    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("created");
            fs::write(path, text).expect("written");
        }
        root
    }

    fn bad(root: &Path) -> Vec<&'static str> {
        let findings = Hardening::read(root).findings();
        assert!(findings.iter().all(|f| f.level != Level::Fail));
        let bad = findings.iter().filter(|f| f.level == Level::Warn);
        bad.map(|f| {
            assert!(f.fix.as_ref().is_some_and(|fix| !fix.is_empty()), "{f:?}");
            f.name
        })
        .collect()
    }

    const SWAPS: &str = "Filename\tType\tSize\tUsed\tPriority\n";

    #[test]
    fn a_hardened_host_has_no_findings() {
        let root = host(&[
            ("sys/devices/system/cpu/smt/active", "0\n"),
            ("sys/kernel/mm/ksm/run", "0\n"),
            ("sys/module/kvm_intel/parameters/nested", "N\n"),
            ("proc/swaps", SWAPS),
            ("proc/cpuinfo", "processor : 0\nmicrocode\t: 0x2b000603\n"),
            ("proc/cmdline", "quiet mitigations=auto,nosmt\n"),
            (
                "sys/devices/system/cpu/vulnerabilities/mds",
                "Mitigation: Clear CPU buffers; SMT vulnerable\n",
            ),
            (
                "sys/devices/system/cpu/vulnerabilities/l1tf",
                "Not affected\n",
            ),
        ]);
        assert_eq!(bad(root.path()), [""; 0]);
        let read = Hardening::read(root.path());
        assert_eq!(read.microcode.as_deref(), Some("0x2b000603"));
    }

    #[test]
    fn each_weakness_is_found_with_its_fix() {
        let cases: [(&str, &str, &[&str]); 10] = [
            ("sys/devices/system/cpu/smt/active", "1\n", &["smt"]),
            ("sys/kernel/mm/ksm/run", "1\n", &["ksm"]),
            (
                "sys/module/kvm_intel/parameters/nested",
                "Y\n",
                &["nested kvm"],
            ),
            (
                "sys/module/kvm_amd/parameters/nested",
                "1\n",
                &["nested kvm"],
            ),
            (
                "proc/cmdline",
                "quiet mitigations=off\n",
                &["cpu mitigations"],
            ),
            (
                "sys/devices/system/cpu/vulnerabilities/mds",
                "Vulnerable: Clear CPU buffers attempted, no microcode\n",
                &["microcode", "cpu mitigations"],
            ),
            (
                "sys/devices/system/cpu/vulnerabilities/old_microcode",
                "Vulnerable\n",
                &["microcode", "cpu mitigations"],
            ),
            (
                "sys/devices/system/cpu/vulnerabilities/itlb_multihit",
                "KVM: Vulnerable\n",
                &["cpu mitigations"],
            ),
            (
                "sys/devices/system/cpu/vulnerabilities/l1tf",
                "Mitigation: PTE Inversion; VMX: vulnerable, SMT disabled\n",
                &["cpu mitigations"],
            ),
            (
                "sys/devices/system/cpu/vulnerabilities/tsx",
                "Vulnerable\n",
                &["cpu mitigations"],
            ),
        ];
        for (path, text, expected) in cases {
            assert_eq!(bad(host(&[(path, text)]).path()), expected, "{path}");
        }
        let swaps = format!("{SWAPS}/swap file 8 0 -2\n");
        assert_eq!(bad(host(&[("proc/swaps", &swaps)]).path()), ["swap"]);
    }

    #[test]
    fn what_the_kernel_does_not_report_is_not_judged() {
        assert_eq!(bad(host(&[]).path()), [""; 0]);
    }
}
