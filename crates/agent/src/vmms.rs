//! VMMs of this host: which there are, their versions, and what a VM needs to run with one.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use parking_lot::Mutex;
use wrenn_proto::{
    machine::VmmKind,
    supervise::{Accel, FirecrackerSpec},
};
use wrenn_snapshot::{HostVmms, InstalledVmm};
use wrenn_sys::program::run_within;

/// Program of QEMU, as the supervisors start it.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Maximum time for a VMM to print its version.
const VERSION_DEADLINE: Duration = Duration::from_secs(10);

/// VMMs of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmConfig {
    /// VMM of VMs that boot. A VM that is restored has the VMM that saved it.
    pub boots: VmmKind,
    /// Accelerator of QEMU. That of Firecracker is KVM.
    pub accel: Accel,
    /// Path of Firecracker; `None` if the host cannot run it.
    pub firecracker: Option<PathBuf>,
    /// Arguments that are appended to the kernel command line of every guest. May be empty.
    pub kernel_args: String,
}

impl VmmConfig {
    /// Returns the configuration of a host that runs all VMs with QEMU.
    #[must_use]
    pub fn qemu(accel: Accel) -> Self {
        Self {
            boots: VmmKind::Qemu,
            accel,
            firecracker: None,
            kernel_args: String::new(),
        }
    }

    /// Returns the accelerator of VMs that boot.
    #[must_use]
    pub fn boot_accel(&self) -> Accel {
        self.accel_of(self.boots)
    }

    /// Returns the accelerator of a VMM.
    pub(crate) fn accel_of(&self, kind: VmmKind) -> Accel {
        match kind {
            VmmKind::Qemu => self.accel,
            VmmKind::Firecracker => Accel::Kvm,
        }
    }

    /// Returns the kernel command line of a VM.
    pub(crate) fn kernel_args(&self, kind: VmmKind, tsc_khz: u32) -> String {
        let mut args = wrenn_image::kernel_args(kind, self.accel_of(kind), tsc_khz);
        if !self.kernel_args.is_empty() {
            args.push(' ');
            args.push_str(&self.kernel_args);
        }
        args
    }

    /// Returns what a supervisor needs to run a VM with Firecracker; `None` for QEMU.
    pub(crate) fn firecracker_spec(
        &self,
        kind: VmmKind,
        exporter_uid: u32,
    ) -> Option<FirecrackerSpec> {
        let program = self.firecracker.clone();
        (kind == VmmKind::Firecracker).then(|| FirecrackerSpec {
            // A snapshot whose VMM is missing is rejected before this.
            program: program.unwrap_or_default(),
            exporter_uid,
        })
    }
}

/// VMMs of this host. One may be replaced while the agent runs, for example by a security update:
/// its version is read again whenever its program has changed.
#[derive(Debug)]
pub(crate) struct Vmms {
    boots: VmmKind,
    /// That of the VMs that boot first.
    programs: Vec<Vmm>,
    cpu: String,
}

/// VMM of this host.
#[derive(Debug)]
struct Vmm {
    kind: VmmKind,
    program: PathBuf,
    accel: Accel,
    known: Mutex<Option<(Version, String)>>,
}

/// Identity of a program's file and content: device, inode, size, and times of the last changes of
/// content and inode in seconds and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Version {
    fn of(program: &Path) -> io::Result<Self> {
        let meta = fs::metadata(program)?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

impl Vmms {
    /// Returns the VMMs of this host. Starts no program.
    pub(crate) fn of_host(config: &VmmConfig) -> Self {
        let vmm = |kind, program| Vmm::at(kind, program, config.accel_of(kind));
        let mut programs = vec![vmm(VmmKind::Qemu, QEMU.into())];
        if let Some(program) = &config.firecracker {
            programs.push(vmm(VmmKind::Firecracker, program.clone()));
        }
        Self::of(config.boots, programs)
    }

    fn of(boots: VmmKind, mut programs: Vec<Vmm>) -> Self {
        programs.sort_by_key(|vmm| vmm.kind != boots);
        Self {
            boots,
            programs,
            cpu: cpu(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        }
    }

    /// QEMU of a given version, for tests.
    #[cfg(test)]
    pub(crate) fn with_version(version: &str, accel: Accel) -> Self {
        // The version counts as long as this file does not change.
        let program = PathBuf::from("/bin/sh");
        let vmm = Vmm::at(VmmKind::Qemu, program.clone(), accel);
        *vmm.known.lock() = Version::of(&program).ok().zip(Some(version.to_owned()));
        Self::of(VmmKind::Qemu, vec![vmm])
    }

    /// Returns the current state of the VMMs. Blocks if a program has changed since the last call:
    /// then the program is run once. A version that cannot be read is `qemu unknown` or
    /// `firecracker unknown`, which loads no snapshot.
    pub(crate) fn current(&self) -> HostVmms {
        let mut installed = self.programs.iter().map(Vmm::installed);
        let missing = || InstalledVmm {
            kind: self.boots,
            version: unknown(self.boots),
            accel: Accel::Kvm,
        };
        HostVmms {
            boots: installed.next().unwrap_or_else(missing),
            other: installed.next(),
            cpu: self.cpu.clone(),
        }
    }

    /// Returns kind and version of the VMM of VMs that boot, if it can be read. May block.
    pub(crate) fn version(&self) -> Option<String> {
        self.programs.first()?.version()
    }

    /// Returns kind and accelerator of VMs that boot.
    pub(crate) fn boots(&self) -> (VmmKind, Accel) {
        let accel = self.programs.first().map_or(Accel::Kvm, |vmm| vmm.accel);
        (self.boots, accel)
    }
}

impl Vmm {
    fn at(kind: VmmKind, program: PathBuf, accel: Accel) -> Self {
        Self {
            kind,
            program,
            accel,
            known: Mutex::default(),
        }
    }

    fn installed(&self) -> InstalledVmm {
        InstalledVmm {
            kind: self.kind,
            version: self.version().unwrap_or_else(|| unknown(self.kind)),
            accel: self.accel,
        }
    }

    /// Returns kind and version, such as `qemu 7.2.22`. May block. A failure is logged, and the
    /// next call tries again.
    fn version(&self) -> Option<String> {
        let mut known = self.known.lock();
        let file = Version::of(&self.program).ok();
        if let (Some(file), Some((read, version))) = (file, &*known)
            && file == *read
        {
            return Some(version.clone());
        }
        let version = version(self.kind, &self.program)
            .inspect_err(|error| {
                let program = self.program.display();
                tracing::warn!(%program, %error, "failed to read the version of the VMM");
            })
            .ok();
        *known = file.zip(version.clone());
        version
    }
}

fn unknown(kind: VmmKind) -> String {
    format!("{kind} unknown")
}

/// Returns kind and version of a VMM, such as `qemu 7.2.22`.
fn version(kind: VmmKind, program: &Path) -> io::Result<String> {
    let text = output(program)?;
    let mut words = text.split_whitespace();
    let version = match kind {
        // "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"
        VmmKind::Qemu => words.nth(3),
        // "Firecracker v1.16.1"
        VmmKind::Firecracker => words.nth(1).and_then(|word| word.strip_prefix('v')),
    };
    let version = version.ok_or_else(|| io::Error::other("its output has no version"))?;
    Ok(format!("{kind} {version}"))
}

/// Returns what a program prints about its version.
fn output(program: &Path) -> io::Result<String> {
    let ended = run_within(VERSION_DEADLINE, Command::new(program).arg("--version"))?;
    Ok(String::from_utf8_lossy(&ended.output.stdout).into_owned())
}

/// Returns vendor, family, model and stepping of the first processor in the text of
/// `/proc/cpuinfo`, such as `GenuineIntel 6/85/7`.
fn cpu(info: &str) -> String {
    let field = |name: &str| {
        let line = info.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then_some(value.trim())
        });
        line.unwrap_or("?")
    };
    let numbers = ["cpu family", "model", "stepping"].map(field);
    format!("{} {}", field("vendor_id"), numbers.join("/"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_version_of_the_vmm_follows_its_program() {
        let dir = tempfile::tempdir().unwrap();
        let (program, log) = (dir.path().join("qemu"), dir.path().join("log"));
        let install = |version: &str| {
            let new = dir.path().join("new");
            let text = format!(
                "#!/bin/sh\necho run >>{}\necho 'QEMU emulator version {version} (Debian)'\n",
                log.display()
            );
            fs::write(&new, text).unwrap();
            fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
            fs::rename(&new, &program).unwrap();
        };
        let vmm = Vmm::at(VmmKind::Qemu, program.clone(), Accel::Tcg);
        assert_eq!(vmm.installed().version, "qemu unknown");
        for version in ["7.2.21", "7.2.22"] {
            install(version);
            for _ in 0..2 {
                assert_eq!(vmm.installed().version, format!("qemu {version}"));
            }
        }
        // Once per program.
        assert_eq!(fs::read_to_string(&log).unwrap(), "run\nrun\n");
        // A failure is not remembered.
        let text = fs::read_to_string(&program).unwrap();
        fs::write(&program, "#!/bin/sh\nexit 1\n").unwrap();
        assert_eq!(vmm.version(), None);
        fs::write(&program, text).unwrap();
        assert_eq!(vmm.version().as_deref(), Some("qemu 7.2.22"));
    }

    #[test]
    fn a_processor_is_named_by_its_numbers() {
        let info = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\n\
            model name\t: Some CPU: fast\nstepping\t: 7\n\nprocessor\t: 1\nvendor_id\t: Other\n";
        assert_eq!(cpu(info), "GenuineIntel 6/85/7");
        assert_eq!(cpu(""), "? ?/?/?");
    }

    #[test]
    fn each_kind_prints_its_version_in_its_own_way() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("vmm");
        for (kind, prints, expected) in [
            (VmmKind::Qemu, "QEMU emulator version 9.0.1", "qemu 9.0.1"),
            (
                VmmKind::Firecracker,
                "Firecracker v1.16.1\n\nexiting",
                "firecracker 1.16.1",
            ),
            (
                VmmKind::Firecracker,
                "something else",
                "firecracker unknown",
            ),
        ] {
            fs::write(&program, format!("#!/bin/sh\necho '{prints}'\n")).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
            let vmm = Vmm::at(kind, program.clone(), Accel::Kvm);
            assert_eq!(vmm.installed().version, expected);
        }
    }

    #[test]
    fn vmm_of_vms_that_boot_comes_first() {
        for boots in VmmKind::ALL {
            let config = VmmConfig {
                boots,
                firecracker: Some("/nowhere".into()),
                ..VmmConfig::qemu(Accel::Tcg)
            };
            let vmms = Vmms::of_host(&config);
            let expected = match boots {
                VmmKind::Qemu => Accel::Tcg,
                VmmKind::Firecracker => Accel::Kvm,
            };
            assert_eq!(vmms.boots(), (boots, expected));
            assert_eq!(vmms.programs.len(), 2);
            assert_eq!(vmms.programs[0].kind, boots);
        }
    }
}
