use wrenn_agent::{Obstacle, Subnets};

use super::*;

/// Simulated machine without problems; tests change one property at a time.
struct Fake {
    root: bool,
    accel: Decision,
    vmm: VmmChoice,
    firecracker: Result<vmm::Program, String>,
    is_kvm_checked: bool,
    object_store: Option<Result<String, String>>,
    cpu: Result<String, String>,
    lacks: Vec<&'static str>,
    cgroups: Cgroups,
    netns: Result<(), String>,
    network: Result<NetworkReport, String>,
    nameservers: Vec<IpAddr>,
    disk: u64,
    memory: u64,
    hardening: Hardening,
    templates: Result<Vec<String>, String>,
    cold: Result<Vec<(String, String)>, String>,
}

fn good() -> Fake {
    Fake {
        root: true,
        accel: Decision {
            accel: Accel::Kvm,
            no_kvm: None,
        },
        vmm: VmmChoice::Auto,
        firecracker: Err("`firecracker` is not in PATH".to_owned()),
        is_kvm_checked: true,
        object_store: None,
        cpu: Ok("host".to_owned()),
        lacks: vec![],
        cgroups: Cgroups {
            v2: ["cpu", "memory", "pids"].map(str::to_owned).to_vec(),
            v1: vec![],
            unusable: vec![],
            required: true,
        },
        netns: Ok(()),
        network: Ok(NetworkReport {
            subnets: Ok(Subnets::DEFAULT),
            obstacle: Ok(None),
        }),
        nameservers: vec![[127, 0, 0, 1].into()],
        disk: 100 << 30,
        memory: 8 << 30,
        hardening: Hardening::default(),
        templates: Ok(["base", "minimal", "minimal-ubuntu"]
            .map(str::to_owned)
            .to_vec()),
        cold: Ok(vec![]),
    }
}

impl Machine for Fake {
    fn is_root(&self) -> bool {
        self.root
    }
    fn vmm(&self) -> vmm::Decision {
        vmm::Decision {
            accel: self.accel.clone(),
            choice: self.vmm,
            firecracker: self.firecracker.clone(),
            is_kvm_checked: self.is_kvm_checked,
        }
    }
    fn cpu(&self) -> Result<String, String> {
        self.cpu.clone()
    }
    fn has_program(&self, name: &str) -> bool {
        !self.lacks.contains(&name)
    }
    fn device(&self, path: &str) -> Result<(), String> {
        if self.lacks.contains(&path) {
            Err("No such file or directory".to_owned())
        } else {
            Ok(())
        }
    }
    fn cgroups(&self) -> Cgroups {
        self.cgroups.clone()
    }
    fn network_namespace(&self) -> Result<(), String> {
        self.netns.clone()
    }
    fn network(&self) -> Result<NetworkReport, String> {
        self.network.clone()
    }
    fn nameservers(&self) -> Nameservers {
        Nameservers {
            servers: self.nameservers.clone(),
            source: "/etc/resolv.conf".to_owned(),
        }
    }
    fn free_disk(&self) -> Result<(u64, String), String> {
        Ok((self.disk, "/var/lib".to_owned()))
    }
    fn free_memory(&self) -> Result<u64, String> {
        Ok(self.memory)
    }
    fn paging_library(&self) -> Result<String, String> {
        self.device("library").map(|()| "library".to_owned())
    }
    fn hardening(&self) -> Hardening {
        self.hardening.clone()
    }
    fn object_store(&self) -> Option<Result<String, String>> {
        self.object_store.clone()
    }
    fn templates(&self) -> Result<Vec<String>, String> {
        self.templates.clone()
    }
    fn cold_templates(&self) -> Result<Vec<(String, String)>, String> {
        self.cold.clone()
    }
}

/// Returns the only finding that is not `ok`.
#[track_caller]
fn only_finding(machine: &Fake) -> Finding {
    let mut bad: Vec<Finding> = examine(machine)
        .into_iter()
        .filter(|f| f.level != Level::Ok)
        .collect();
    assert_eq!(bad.len(), 1, "{bad:#?}");
    bad.remove(0)
}

#[test]
fn suitable_host_has_no_findings() {
    let findings = examine(&good());
    assert!(
        findings
            .iter()
            .all(|f| f.level == Level::Ok && f.fix.is_none()),
        "{findings:#?}"
    );
    assert!(healthy(&findings));
}

#[test]
fn no_hardware_virtualization_is_a_warning_only() {
    let mut machine = good();
    machine.accel = Decision {
        accel: Accel::Tcg,
        no_kvm: Some("the CPU reports neither vmx nor svm".into()),
    };
    let finding = only_finding(&machine);
    assert_eq!((finding.name, finding.level), ("acceleration", Level::Warn));
    assert!(
        finding.detail.contains("neither vmx nor svm"),
        "{finding:?}"
    );
    assert!(finding.detail.contains("not a security boundary"));
    assert!(healthy(&examine(&machine)));
    machine.accel.no_kvm = None;
    let finding = only_finding(&machine);
    assert!(finding.detail.contains("not a security boundary"));
}

#[test]
fn requested_kvm_that_is_missing_fails() {
    let mut machine = good();
    machine.accel.no_kvm = Some("the CPU reports neither vmx nor svm".into());
    assert_eq!(only_finding(&machine).level, Level::Fail);
}

#[test]
fn missing_programs_are_named_with_the_command_that_installs_their_packages() {
    let mut machine = good();
    machine.lacks = vec!["qemu-img", "nft"];
    let finding = only_finding(&machine);
    assert_eq!(finding.level, Level::Fail);
    assert_eq!(finding.detail, "missing: qemu-img nft");
    let fix = finding.fix.unwrap_or_default();
    assert!(fix.ends_with("qemu-utils nftables"), "{fix}");
}

#[test]
fn programs_for_building_matter_only_until_the_image_is_built() {
    let mut machine = good();
    machine.lacks = vec!["mmdebstrap"];
    assert_eq!(only_finding(&machine).level, Level::Warn);
    machine.templates = Ok(vec![]);
    assert!(!healthy(&examine(&machine)));
}

#[test]
fn every_other_problem_is_found_with_a_fix() {
    type Change = fn(&mut Fake);
    let cases: [(&str, Level, Change); 18] = [
        ("root", Level::Fail, |m| m.root = false),
        ("guest cpu", Level::Fail, |m| {
            m.cpu = Err("unable to find CPU model".into());
        }),
        ("tap devices", Level::Fail, |m| {
            m.lacks = vec!["/dev/net/tun"]
        }),
        ("userfaultfd", Level::Fail, |m| {
            m.lacks = vec!["/dev/userfaultfd"];
        }),
        ("paging library", Level::Fail, |m| {
            m.lacks = vec!["library"];
        }),
        ("network namespaces", Level::Fail, |m| {
            m.netns = Err("Operation not permitted".into());
        }),
        ("subnets", Level::Fail, |m| {
            m.network.as_mut().expect("a report").subnets = Err("10.11.0.0/16 is used".into());
        }),
        ("firewall", Level::Warn, |m| {
            m.network.as_mut().expect("a report").obstacle = Err("no `nft`".into());
        }),
        ("name servers", Level::Warn, |m| m.nameservers.clear()),
        ("cgroups", Level::Warn, |m| m.cgroups = Cgroups::default()),
        ("cgroups", Level::Fail, |m| {
            m.cgroups.unusable = vec!["/sys/fs/cgroup: read-only file system".to_owned()];
        }),
        ("cgroups", Level::Fail, |m| {
            m.cgroups = Cgroups {
                required: true,
                ..Cgroups::default()
            };
        }),
        ("free disk", Level::Fail, |m| m.disk = (4 << 30) - 1),
        ("free memory", Level::Fail, |m| m.memory = (1 << 30) - 1),
        ("smt", Level::Warn, |m| m.hardening.smt = Some(true)),
        ("images", Level::Warn, |m| m.templates = Ok(vec![])),
        ("images", Level::Warn, |m| {
            m.templates = Ok(vec!["minimal".to_owned()]);
        }),
        ("template snapshots", Level::Warn, |m| {
            m.cold = Err("failed to list the templates".into());
        }),
    ];
    for (name, level, change) in cases {
        let mut machine = good();
        change(&mut machine);
        let finding = only_finding(&machine);
        assert_eq!((finding.name, finding.level), (name, level));
        assert!(finding.fix.is_some_and(|fix| !fix.is_empty()), "{name}");
    }
}

#[test]
fn a_firewall_that_blocks_is_named_with_the_command_that_permits() {
    let mut machine = good();
    machine.network.as_mut().expect("a report").obstacle = Ok(Some(Obstacle {
        what: "Docker (chain FORWARD of table filter)".to_owned(),
        fix: "iptables -I DOCKER-USER -j ACCEPT".to_owned(),
    }));
    let finding = only_finding(&machine);
    assert_eq!((finding.name, finding.level), ("firewall", Level::Warn));
    assert!(finding.detail.contains("Docker"), "{finding:?}");
    assert_eq!(
        finding.fix.as_deref(),
        Some("iptables -I DOCKER-USER -j ACCEPT")
    );
}

#[test]
fn templates_that_boot_are_named_with_the_command_that_restores_them() {
    let mut machine = good();
    let reason = "its template snapshot was made from another build of the template";
    machine.cold = Ok(vec![("minimal".to_owned(), reason.to_owned())]);
    let finding = only_finding(&machine);
    assert_eq!(
        (finding.name, finding.level),
        ("template snapshots", Level::Warn)
    );
    assert!(finding.detail.contains(reason), "{finding:?}");
    assert_eq!(finding.fix.as_deref(), Some("wrenn image build minimal"));
}

#[test]
fn report_has_one_line_per_finding_and_per_fix() {
    let findings = [
        Finding::ok("root", "yes"),
        Finding::bad(Level::Fail, "tap devices", "missing", "modprobe tun"),
    ];
    assert_eq!(
        render(&findings, false),
        "ok    root         yes\nfail  tap devices  missing\n                   → modprobe tun\n"
    );
    assert!(render(&findings, true).contains("\x1b[31mfail\x1b[0m"));
}

#[test]
fn controllers_are_found_on_either_version_and_on_a_mix() {
    let mix = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
        cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n\
        cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
        cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
    let found = Cgroups::read(mix, |_| Some(String::new()));
    assert_eq!(found.missing(), ["pids"]);
    assert_eq!(found.to_string(), "v1: cpu memory");

    let unified = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
    let found = Cgroups::read(unified, |at| {
        (at == "/sys/fs/cgroup").then(|| "cpuset cpu io memory pids\n".to_owned())
    });
    assert_eq!(found.missing(), [""; 0]);
    assert_eq!(found.to_string(), "v2: cpu memory pids");

    assert_eq!(Cgroups::read("", |_| None).missing(), ALL_CONTROLLERS);
}

const ALL_CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

#[test]
fn firecracker_is_reported_with_its_version_or_the_reason() {
    let mut machine = good();
    let report = |machine: &Fake| {
        let finding = firecracker(&machine.vmm());
        (finding.level, finding.detail)
    };
    let (level, detail) = report(&machine);
    assert!(
        level == Level::Ok && detail.contains("not in PATH"),
        "{detail}"
    );
    machine.vmm = VmmChoice::Firecracker;
    let (level, detail) = report(&machine);
    assert!(
        level == Level::Fail && detail.contains("not in PATH"),
        "{detail}"
    );
    machine.firecracker = Ok(vmm::Program {
        path: "/opt/firecracker".into(),
        version: "1.16.1".to_owned(),
    });
    let (level, detail) = report(&machine);
    assert!(level == Level::Ok && detail.contains("1.16.1"), "{detail}");
    machine.vmm = VmmChoice::Qemu;
    let (level, detail) = report(&machine);
    assert!(
        level == Level::Ok && detail.contains("only restores"),
        "{detail}"
    );
}

#[test]
fn device_of_disk_exports_is_needed_with_firecracker_only() {
    let mut machine = good();
    machine.lacks = vec!["/dev/fuse"];
    let fuse = |machine: &Fake| {
        let findings = examine(machine);
        let found = findings.iter().find(|finding| finding.name == "fuse");
        found.map(|finding| finding.level)
    };
    assert_eq!(fuse(&machine), None);
    machine.firecracker = Ok(vmm::Program {
        path: "/opt/firecracker".into(),
        version: "1.16.1".to_owned(),
    });
    assert_eq!(fuse(&machine), Some(Level::Fail));
}

#[test]
fn unchecked_kvm_is_a_warning() {
    let mut machine = good();
    assert_eq!(kvm_check(&machine.vmm()).level, Level::Ok);
    machine.is_kvm_checked = false;
    assert_eq!(kvm_check(&machine.vmm()).level, Level::Warn);
    machine.accel.accel = Accel::Tcg;
    assert_eq!(kvm_check(&machine.vmm()).level, Level::Ok);
}

#[test]
fn object_store_is_reported_only_if_there_is_one() {
    let mut machine = good();
    let report = |machine: &Fake| {
        let findings = examine(machine);
        let found = findings
            .iter()
            .find(|finding| finding.name == "object store");
        found.map(|finding| (finding.level, finding.detail.clone()))
    };
    assert_eq!(report(&machine), None);
    machine.object_store = Some(Ok("s3://b/p".to_owned()));
    assert_eq!(report(&machine), Some((Level::Ok, "s3://b/p".to_owned())));
    machine.object_store = Some(Err("no answer".to_owned()));
    let bad = Some((Level::Fail, "no answer".to_owned()));
    assert_eq!(report(&machine), bad);
}
