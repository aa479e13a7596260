//! Memory files of snapshots: one per snapshot, shared by all VMs that run from it.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, Mode, fchmod, ftruncate, memfd_create};
use wrenn_snapshot::SnapshotId;

/// Memory of a snapshot: an unnamed file (memfd) that the supervisors of its VMs fill on demand.
#[derive(Debug)]
pub(crate) struct ImageMemory(OwnedFd);

impl ImageMemory {
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Memory files in use.
#[derive(Debug, Default)]
pub(super) struct Memories(Mutex<HashMap<SnapshotId, Weak<ImageMemory>>>);

impl Memories {
    pub(super) fn get_or_make(
        &self,
        build: SnapshotId,
        memory_mib: u32,
    ) -> io::Result<Arc<ImageMemory>> {
        let mut memories = self.0.lock();
        if let Some(memory) = memories.get(&build).and_then(Weak::upgrade) {
            return Ok(memory);
        }
        let fd = memfd_create(c"snapshot-memory", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, u64::from(memory_mib) * 1024 * 1024)?;
        // Other VMs run from this file, so a VMM must not be able to open it for writing.
        fchmod(&fd, Mode::RUSR)?;
        let memory = Arc::new(ImageMemory(fd));
        memories.retain(|_, memory| memory.strong_count() > 0);
        memories.insert(build, Arc::downgrade(&memory));
        Ok(memory)
    }

    /// Registers a memory file. The first file registered for a snapshot is kept. All supervisors
    /// have the same file, unless an agent was killed between two creates.
    pub(super) fn adopt(&self, build: SnapshotId, fd: OwnedFd) -> Arc<ImageMemory> {
        let mut memories = self.0.lock();
        if let Some(memory) = memories.get(&build).and_then(Weak::upgrade) {
            return memory;
        }
        let memory = Arc::new(ImageMemory(fd));
        memories.insert(build, Arc::downgrade(&memory));
        memory
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd as _;

    #[test]
    fn vms_of_one_snapshot_share_its_memory() {
        let memories = Memories::default();
        let build = SnapshotId([1; 16]);
        let first = memories.get_or_make(build, 1).unwrap();
        let second = memories.get_or_make(build, 1).unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        let other = memories.get_or_make(SnapshotId([2; 16]), 1).unwrap();
        assert_ne!(first.as_fd().as_raw_fd(), other.as_fd().as_raw_fd());
        drop((first, second));
        let fresh = memories.get_or_make(build, 1).unwrap();
        assert_eq!(Arc::strong_count(&fresh), 1);
    }
}
