//! Properties of this host: its VMM, its processor and its capacity.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use wrenn_proto::supervise::Accel;
use wrenn_snapshot::HostVmm;
use wrenn_sys::meminfo::MemInfo;

/// Program of the VMM, as the supervisors start it.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Maximum time for the VMM to print its version.
const VERSION_DEADLINE: Duration = Duration::from_secs(10);

/// Interval at which the end of the program is checked. It typically runs for some 50 ms.
const VERSION_POLL: Duration = Duration::from_millis(2);

/// Means of this host to run VMs. The VMM may be replaced while the agent runs, for example by a
/// security update: its version is read again whenever its program has changed.
#[derive(Debug)]
pub(crate) struct Vmm {
    program: PathBuf,
    accel: Accel,
    cpu: String,
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

impl Vmm {
    /// Returns the VMM of this host. Starts no program.
    pub(crate) fn of_host(accel: Accel) -> Self {
        Self::at(QEMU.into(), accel)
    }

    fn at(program: PathBuf, accel: Accel) -> Self {
        Self {
            program,
            accel,
            cpu: cpu(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            known: Mutex::default(),
        }
    }

    /// VMM of a given version, for tests.
    #[cfg(test)]
    pub(crate) fn with_version(version: &str, accel: Accel) -> Self {
        // The version counts as long as this file does not change.
        let program = PathBuf::from("/bin/sh");
        let vmm = Self::at(program.clone(), accel);
        *vmm.known.lock() = Version::of(&program).ok().zip(Some(version.to_owned()));
        vmm
    }

    /// Returns the current state of the VMM. Blocks if the program has changed since the last call:
    /// then the program is run once. A version that cannot be read is `qemu unknown`, which loads
    /// no snapshot.
    pub(crate) fn current(&self) -> HostVmm {
        HostVmm {
            vmm: self.version().unwrap_or_else(|| "qemu unknown".to_owned()),
            accel: self.accel,
            cpu: self.cpu.clone(),
        }
    }

    pub(crate) fn accel(&self) -> Accel {
        self.accel
    }

    /// Returns kind and version of the VMM, such as `qemu 7.2.22`. May block. A failure is logged,
    /// and the next call tries again.
    pub(crate) fn version(&self) -> Option<String> {
        let mut known = self.known.lock();
        let file = Version::of(&self.program).ok();
        if let (Some(file), Some((read, version))) = (file, &*known)
            && file == *read
        {
            return Some(version.clone());
        }
        let version = version(&self.program)
            .inspect_err(|error| {
                let program = self.program.display();
                tracing::warn!(%program, %error, "failed to read the version of the VMM");
            })
            .ok();
        *known = file.zip(version.clone());
        version
    }
}

/// Returns kind and version of a VMM, such as `qemu 7.2.22`.
fn version(program: &Path) -> io::Result<String> {
    let text = output(program)?;
    // "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"
    let version = text.split_whitespace().nth(3);
    let version = version.ok_or_else(|| io::Error::other("its output has no version"))?;
    Ok(format!("qemu {version}"))
}

/// Returns what a program prints about its version: a few lines, which fit into the pipe.
fn output(program: &Path) -> io::Result<String> {
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + VERSION_DEADLINE;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
        }
        std::thread::sleep(VERSION_POLL);
    }
    let output = child.wait_with_output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
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

/// Capacity of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostCapacity {
    pub(crate) cpu_count: u32,
    pub(crate) memory_total_mib: u64,
    pub(crate) memory_available_mib: u64,
    pub(crate) disk_free_mib: u64,
}

impl HostCapacity {
    /// Reads the capacity from the kernel.
    pub(crate) fn read(data_dir: &Path) -> io::Result<Self> {
        let memory = MemInfo::read()?;
        let field_mib = |name| memory.bytes(name).map(|bytes| bytes / (1024 * 1024));
        let cpus = std::thread::available_parallelism()?.get();
        Ok(Self {
            cpu_count: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory_total_mib: field_mib("MemTotal")?,
            memory_available_mib: field_mib("MemAvailable")?,
            disk_free_mib: disk_free_mib(data_dir)?,
        })
    }
}

fn disk_free_mib(path: &Path) -> io::Result<u64> {
    let fs = rustix::fs::statvfs(path)?;
    Ok(fs.f_bavail.saturating_mul(fs.f_frsize) / (1024 * 1024))
}

/// True if an error means that a file system is full or its quota is used up.
pub(crate) fn is_out_of_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
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
        let vmm = Vmm::at(program.clone(), Accel::Tcg);
        assert_eq!(vmm.current().vmm, "qemu unknown");
        for version in ["7.2.21", "7.2.22"] {
            install(version);
            for _ in 0..2 {
                assert_eq!(vmm.current().vmm, format!("qemu {version}"));
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
    fn capacity_of_this_host_is_not_zero() {
        let facts = HostCapacity::read(Path::new("/")).unwrap();
        assert!(facts.cpu_count > 0 && facts.memory_total_mib >= facts.memory_available_mib);
        assert!(facts.memory_available_mib > 0);
    }
}
