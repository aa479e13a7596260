//! Disk space of the host for sandboxes: what is kept free, and what may be used.
//!
//! ```text
//! 0                                        total of the file system
//! |---------- used ----------|---- free ----|
//!                               room | room
//!                                    high-water mark: creates, snapshots and forks are rejected
//!                               room: guests that write are stopped until there is space again
//! ```
//!
//! The *room* is kept for pauses, which save guests when space is short, and for the database. The
//! supervisors enforce it, because only they notice in time that a guest writes
//! (`supervisor::disk_room`). This module computes it, and checks what the agent is about to add.
//!
//! A pause is never rejected: it is how a sandbox's lifetime ends, and it frees memory.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use wrenn_model::MachineSize;

use crate::{admission::AdmissionError, limits::HostLimits};

const MIB: u64 = 1024 * 1024;

/// Default room: this part of the file system, in percent, but not more than [`MAX_ROOM`].
const ROOM_PERCENT: u64 = 2;

/// Maximum of the default room, in bytes. Enough for the memory of several typical guests.
const MAX_ROOM: u64 = 4096 * MIB;

/// Minimum free space for a create, in bytes, even on a small file system.
const CREATE_FLOOR: u64 = 256 * MIB;

/// Default budget of one sandbox: its disk and its memory, this many times.
const BUDGET_FACTOR: u64 = 4;

/// Time for which the measured use of all sandboxes is valid.
const USE_FRESH: Duration = Duration::from_secs(5);

/// Disk space for sandboxes.
#[derive(Debug)]
pub(crate) struct DiskSpace {
    data_dir: PathBuf,
    snapshots_dir: PathBuf,
    room_bytes: u64,
    /// Maximum use of all sandboxes and snapshots.
    budget_bytes: Option<u64>,
    /// Maximum use of one sandbox.
    sandbox_budget_bytes: Option<u64>,
    /// Space for snapshots that are being written.
    pending_bytes: Arc<Mutex<u64>>,
    /// Use of all sandboxes and snapshots, and when it was measured.
    used: Mutex<Option<(Instant, u64)>>,
}

/// Disk space for a snapshot that is being written. Free again on drop.
#[derive(Debug)]
pub(crate) struct DiskReservation {
    pending_bytes: Arc<Mutex<u64>>,
    bytes: u64,
}

impl Drop for DiskReservation {
    fn drop(&mut self) {
        *self.pending_bytes.lock() -= self.bytes;
    }
}

impl DiskSpace {
    /// Returns the disk space of a data directory and of its snapshot store.
    pub(crate) fn open(
        data_dir: &Path,
        snapshots_dir: &Path,
        limits: &HostLimits,
    ) -> io::Result<Self> {
        let stat = rustix::fs::statvfs(data_dir)?;
        let total_bytes = stat.f_blocks.saturating_mul(stat.f_frsize);
        let room_bytes = limits
            .disk_reserve_mib
            .map_or_else(|| default_room(total_bytes), bytes_of_mib);
        Ok(Self {
            data_dir: data_dir.to_owned(),
            snapshots_dir: snapshots_dir.to_owned(),
            room_bytes,
            budget_bytes: limits.disk_budget_mib.map(bytes_of_mib),
            sandbox_budget_bytes: limits.sandbox_disk_budget_mib.map(bytes_of_mib),
            pending_bytes: Arc::default(),
            used: Mutex::default(),
        })
    }

    /// Returns the space that guests must leave free, in bytes.
    pub(crate) const fn room_bytes(&self) -> u64 {
        self.room_bytes
    }

    /// True if less is free than the room, or almost nothing.
    pub(crate) fn is_short(&self) -> bool {
        self.check_free(self.room_bytes.max(CREATE_FLOOR)).is_err()
    }

    /// Reserves space for a compacted copy of files.
    pub(crate) fn reserve_copy(
        &self,
        files: &[PathBuf],
    ) -> Result<DiskReservation, AdmissionError> {
        self.reserve(bytes_of(files))
    }

    /// Checks that there is space for one more sandbox.
    pub(crate) fn check_create(&self) -> Result<(), AdmissionError> {
        self.check_free(self.high_water_bytes().max(CREATE_FLOOR))?;
        self.check_budget()
    }

    /// Reserves space for one more snapshot of a running sandbox: for its memory, and for copies of
    /// `open`, the disk files that the VMM may write to. Snapshots that are taken at the same time
    /// do not count on the same space.
    pub(crate) fn reserve_snapshot(
        &self,
        memory_bytes: u64,
        open: &[PathBuf],
    ) -> Result<DiskReservation, AdmissionError> {
        self.check_free(self.high_water_bytes())?;
        self.check_budget()?;
        self.reserve(memory_bytes.saturating_add(bytes_of(open)))
    }

    /// Reserves bytes above the room.
    fn reserve(&self, bytes: u64) -> Result<DiskReservation, AdmissionError> {
        let mut pending_bytes = self.pending_bytes.lock();
        let all = pending_bytes.saturating_add(bytes);
        self.check_free(self.room_bytes.saturating_add(all))?;
        *pending_bytes = all;
        Ok(DiskReservation {
            pending_bytes: self.pending_bytes.clone(),
            bytes,
        })
    }

    /// Checks the disk size of a new sandbox: a disk must not be larger than the budget of its
    /// sandbox.
    pub(crate) fn check_size(&self, size: MachineSize) -> Result<(), AdmissionError> {
        match self.sandbox_budget_bytes.map(|bytes| bytes / MIB) {
            Some(budget_mib) if u64::from(size.disk_mib) > budget_mib => {
                Err(AdmissionError::DiskSize {
                    disk_mib: size.disk_mib,
                    budget_mib,
                })
            }
            _ => Ok(()),
        }
    }

    /// Checks that the files of a sandbox are within its budget.
    pub(crate) fn check_sandbox(
        &self,
        size: MachineSize,
        files: &[PathBuf],
    ) -> Result<(), AdmissionError> {
        let budget = self.sandbox_budget(size);
        let used = bytes_of(files);
        if used <= budget {
            return Ok(());
        }
        Err(AdmissionError::SandboxBudget {
            used_mib: used / MIB,
            budget_mib: budget / MIB,
        })
    }

    fn sandbox_budget(&self, size: MachineSize) -> u64 {
        let own = (u64::from(size.disk_mib) + u64::from(size.memory_mib)) * MIB;
        self.sandbox_budget_bytes
            .unwrap_or_else(|| own.saturating_mul(BUDGET_FACTOR))
    }

    /// Free space below which nothing is added, in bytes.
    const fn high_water_bytes(&self) -> u64 {
        self.room_bytes.saturating_mul(2)
    }

    fn check_free(&self, required: u64) -> Result<(), AdmissionError> {
        let stat = rustix::fs::statvfs(&self.data_dir).map_err(io::Error::from);
        let stat = stat.map_err(AdmissionError::Capacity)?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free >= required {
            return Ok(());
        }
        Err(AdmissionError::Disk {
            free_mib: free / MIB,
            required_mib: required.div_ceil(MIB),
        })
    }

    fn check_budget(&self) -> Result<(), AdmissionError> {
        let Some(budget) = self.budget_bytes else {
            return Ok(());
        };
        let used = self.used_bytes().map_err(AdmissionError::Capacity)?;
        if used < budget {
            return Ok(());
        }
        Err(AdmissionError::DiskBudget {
            used_mib: used / MIB,
            budget_mib: budget / MIB,
        })
    }

    /// Returns the space that all sandboxes and snapshots use. Measured at most once per
    /// [`USE_FRESH`].
    fn used_bytes(&self) -> io::Result<u64> {
        let mut used = self.used.lock();
        if let Some((when, bytes)) = *used
            && when.elapsed() < USE_FRESH
        {
            return Ok(bytes);
        }
        let mut files = Vec::new();
        for dir in [&self.data_dir.join("sandboxes"), &self.snapshots_dir] {
            list(dir, &mut files)?;
        }
        let bytes = bytes_of(&files);
        *used = Some((Instant::now(), bytes));
        Ok(bytes)
    }
}

const fn default_room(total_bytes: u64) -> u64 {
    let part = total_bytes / 100 * ROOM_PERCENT;
    if part < MAX_ROOM { part } else { MAX_ROOM }
}

const fn bytes_of_mib(mib: u64) -> u64 {
    mib.saturating_mul(MIB)
}

/// Adds all files below a directory to `files`. Files that disappear in the meantime are skipped.
fn list(dir: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => list(&entry.path(), files)?,
            _ => files.push(entry.path()),
        }
    }
    Ok(())
}

/// Returns the space that files use on disk. A file with several links counts once.
fn bytes_of(files: &[PathBuf]) -> u64 {
    let mut seen = HashSet::new();
    let metas = files
        .iter()
        .filter_map(|path| fs::symlink_metadata(path).ok());
    let once = metas.filter(|meta| seen.insert((meta.dev(), meta.ino())));
    // `st_blocks` counts units of 512 bytes, whatever the block size of the file system is.
    once.map(|meta| meta.blocks() * 512).sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const SIZE: MachineSize = MachineSize {
        vcpus: 1,
        memory_mib: 1,
        disk_mib: 2,
    };

    fn space(dir: &Path, limits: HostLimits) -> DiskSpace {
        DiskSpace::open(dir, &dir.join("snapshots"), &limits).unwrap()
    }

    #[test]
    fn the_default_room_is_a_part_of_the_file_system_with_a_maximum() {
        assert_eq!(default_room(1000 * MIB), 20 * MIB);
        assert_eq!(default_room(1 << 50), MAX_ROOM);
    }

    #[test]
    fn creates_and_snapshots_are_rejected_before_the_room_is_reached() {
        crate::private_host::enter();
        let dir = tempfile::tempdir().unwrap();
        let tmpfs = Some("tmpfs");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(tmpfs, dir.path(), tmpfs, flags, Some("size=400m")).unwrap();
        let space = space(dir.path(), HostLimits::default());
        assert_eq!(space.room_bytes(), 8 * MIB);
        space.check_create().unwrap();
        // Less than a create needs, more than a snapshot needs.
        fs::write(dir.path().join("filler"), vec![1; 200 << 20]).unwrap();
        let error = space.check_create().unwrap_err().to_string();
        assert!(error.contains("256 MiB are required"), "{error}");
        // Two snapshots do not count on the same space.
        let first = space.reserve_snapshot(120 * MIB, &[]).unwrap();
        let error = space
            .reserve_snapshot(120 * MIB, &[])
            .unwrap_err()
            .to_string();
        assert!(error.contains("248 MiB are required"), "{error}");
        drop(first);
        space.reserve_snapshot(120 * MIB, &[]).unwrap();
        // A copy of the disk's file needs space, too.
        let open = [dir.path().join("filler")];
        space.reserve_snapshot(0, &open).unwrap_err();
        fs::write(dir.path().join("more"), vec![1; 190 << 20]).unwrap();
        let error = space.reserve_snapshot(0, &[]).unwrap_err().to_string();
        assert!(error.contains("16 MiB are required"), "{error}");
        assert!(error.contains("WRENN_DISK_RESERVE_MB"), "{error}");
    }

    #[test]
    fn all_sandboxes_together_have_a_budget() {
        let dir = tempfile::tempdir().unwrap();
        let limits = HostLimits {
            disk_budget_mib: Some(1),
            ..HostLimits::default()
        };
        fs::create_dir_all(dir.path().join("sandboxes/sb-1")).unwrap();
        space(dir.path(), limits.clone()).check_create().unwrap();
        let disk = dir.path().join("sandboxes/sb-1/rootfs.qcow2");
        fs::write(&disk, vec![1; 1 << 20]).unwrap();
        let error = space(dir.path(), limits).check_create().unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, AdmissionError::DiskBudget { .. }), "{text}");
        assert!(text.contains("WRENN_DISK_BUDGET_MB"), "{text}");
    }

    #[test]
    fn a_sandbox_has_a_budget_in_which_a_file_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let [first, second] = ["first", "second"].map(|name| dir.path().join(name));
        fs::write(&first, vec![1; 12 << 20]).unwrap();
        fs::hard_link(&first, &second).unwrap();
        let files = [first, second];
        // 4 * (2 + 1) MiB.
        let by_default = space(dir.path(), HostLimits::default());
        by_default.check_sandbox(SIZE, &files).unwrap();
        by_default.check_size(SIZE).unwrap();
        let limits = HostLimits {
            sandbox_disk_budget_mib: Some(1),
            ..HostLimits::default()
        };
        let small = space(dir.path(), limits);
        let error = small.check_sandbox(SIZE, &files).unwrap_err().to_string();
        assert!(error.contains("12 of 1 MiB"), "{error}");
        let error = small.check_size(SIZE).unwrap_err().to_string();
        assert!(error.contains("`disk_size_mb`: 2"), "{error}");
    }
}
