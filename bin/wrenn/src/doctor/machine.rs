//! Checks of the machine that this program runs on.

use std::{
    cell::OnceCell,
    fs,
    path::{Path, PathBuf},
};

use nix::{sched, sys::statvfs, unistd};
use wrenn_agent::{NetworkReport, template_snapshot::cold_templates};
use wrenn_proto::machine::VmmKind;
use wrenn_sys::meminfo::MemInfo;
use wrenn_vmm::qemu::{self, CpuError};

use super::{Cgroups, Hardening, Machine};
use crate::{
    config::Settings,
    images,
    nameservers::{self, Nameservers},
    output, vmm,
};

/// This machine, with the settings of this process.
pub(crate) struct ThisMachine<'a> {
    /// Settings, which determine the data directory and the VMM.
    settings: &'a Settings,
    /// Selected VMM, once it is known. Finding it out runs programs.
    decision: OnceCell<vmm::Decision>,
}

impl<'a> ThisMachine<'a> {
    pub(crate) fn new(settings: &'a Settings) -> Self {
        Self {
            settings,
            decision: OnceCell::new(),
        }
    }
}

impl Machine for ThisMachine<'_> {
    fn is_root(&self) -> bool {
        unistd::geteuid().is_root()
    }

    fn vmm(&self) -> vmm::Decision {
        let decide = || vmm::decide(self.settings);
        self.decision.get_or_init(decide).clone()
    }

    fn cpu(&self) -> Result<String, String> {
        let decision = self.vmm();
        let cpu = decision.cpu(self.settings);
        if decision.boots() == VmmKind::Firecracker {
            return Ok(cpu.to_string());
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| e.to_string())?;
        match runtime.block_on(qemu::check_cpu(decision.accel.accel, &cpu)) {
            Err(error @ CpuError::Rejected { .. }) => Err(error.to_string()),
            // A missing QEMU is a finding of its own.
            _ => Ok(cpu.to_string()),
        }
    }

    fn has_program(&self, name: &str) -> bool {
        find_program(name).is_some()
    }

    fn device(&self, path: &str) -> Result<(), String> {
        fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .map(drop)
            .map_err(|e| e.to_string())
    }

    fn cgroups(&self) -> Cgroups {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let found = Cgroups::read(&mounts, |at| {
            fs::read_to_string(Path::new(at).join("cgroup.controllers")).ok()
        });
        let policy = self.settings.host_limits.cgroups;
        Cgroups {
            required: wrenn_agent::requires_limits(policy, &self.settings.dir),
            unusable: match self.is_root() {
                true => wrenn_agent::unusable_cgroups(),
                // Only root can tell.
                false => Vec::new(),
            },
            ..found
        }
    }

    fn network_namespace(&self) -> Result<(), String> {
        // Runs on a separate thread: the namespace belongs to that thread and ends with it.
        std::thread::spawn(|| sched::unshare(sched::CloneFlags::CLONE_NEWNET))
            .join()
            .map_err(|_| "the check panicked".to_owned())?
            .map_err(|e| e.desc().to_owned())
    }

    fn network(&self) -> Result<NetworkReport, String> {
        let subnets = self.settings.subnets;
        on_a_runtime(move || wrenn_agent::examine(subnets))
    }

    fn nameservers(&self) -> Nameservers {
        nameservers::Files::default().nameservers(self.settings)
    }

    fn free_disk(&self) -> Result<(u64, String), String> {
        let dir = nearest_existing(&self.settings.dir);
        let stat =
            statvfs::statvfs(&dir).map_err(|e| format!("{}: {}", dir.display(), e.desc()))?;
        let free = stat.blocks_available().saturating_mul(stat.fragment_size());
        Ok((free, dir.display().to_string()))
    }

    fn free_memory(&self) -> Result<u64, String> {
        let available = MemInfo::read().and_then(|memory| memory.bytes("MemAvailable"));
        available.map_err(|e| format!("failed to read /proc/meminfo: {e}"))
    }

    fn paging_library(&self) -> Result<String, String> {
        let exe = std::env::current_exe()
            .map_err(|e| format!("failed to locate this program's executable: {e}"))?;
        wrenn_supervisor::paging_library(&exe)
            .map(|path| path.display().to_string())
            .map_err(|e| e.to_string())
    }

    fn hardening(&self) -> Hardening {
        Hardening::read(Path::new("/"))
    }

    fn object_store(&self) -> Option<Result<String, String>> {
        let config = self.settings.object_store.clone()?;
        let url = config.url.clone();
        // On a separate thread, because this one may be part of a runtime already.
        let check = std::thread::spawn(move || {
            let scratch = tempfile::tempdir().map_err(|error| error.to_string())?;
            let checked = wrenn_agent::check_object_store(&config, scratch.path());
            checked.map_err(|error| output::in_full(&error))
        });
        let checked = check
            .join()
            .unwrap_or_else(|_| Err("the check failed".to_owned()));
        Some(checked.map(|()| url))
    }

    fn templates(&self) -> Result<Vec<String>, String> {
        images::template_names(&self.settings.images_dir)
    }

    fn cold_templates(&self) -> Result<Vec<(String, String)>, String> {
        let images = self.settings.images_dir.clone();
        if !images.join("templates").is_dir() {
            return Ok(Vec::new());
        }
        let decision = self.vmm();
        let cpu = decision.cpu(self.settings);
        let cold = cold_templates(&images, &decision.config(self.settings), &cpu);
        let cold = cold.map_err(|error| output::in_full(&error))?.into_iter();
        Ok(cold.map(|(name, reason)| (name.into(), reason)).collect())
    }
}

/// Runs a check on a separate thread, because this one may be part of a runtime already.
fn on_a_runtime<T, F>(check: impl FnOnce() -> F + Send + 'static) -> Result<T, String>
where
    T: Send + 'static,
    F: Future<Output = Result<T, String>>,
{
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| e.to_string())?;
        runtime.block_on(check())
    };
    let checked = std::thread::spawn(run).join();
    checked.unwrap_or_else(|_| Err("the check panicked".to_owned()))
}

/// Returns `path`, or its closest ancestor that exists.
fn nearest_existing(path: &Path) -> PathBuf {
    path.ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("/"))
        .to_owned()
}

/// Searches PATH and the directories of system programs, which PATH may not contain.
fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| {
            unistd::access(candidate, unistd::AccessFlags::X_OK).is_ok() && candidate.is_file()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_space_of_a_missing_directory_is_that_of_its_parent() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(nearest_existing(&dir.path().join("a/b")), dir.path());
        assert_eq!(nearest_existing(Path::new("relative/none")), Path::new("/"));
    }

    #[test]
    fn program_is_found_and_a_directory_of_that_name_is_not() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program").is_none());
        assert!(find_program("../bin").is_none());
    }
}
