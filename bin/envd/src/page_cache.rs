//! Size of the page cache in snapshots.
//!
//! A large page cache makes a snapshot large without benefit, because its pages can be read from
//! the disk again. Dropping the whole cache before every snapshot is worse than keeping it: after a
//! restore, the same data is read into other pages of memory, and the next snapshot has to store
//! each of these pages as changed. envd therefore drops the cache only if it has grown by more than
//! `MOST_GROWTH_BYTES` since the last snapshot. Until then, the cache consists of the same pages
//! with the same content, which cost nothing. The size at the last snapshot is stored in the
//! guest's memory, so a restored guest has it.

use std::{
    fs, io,
    sync::atomic::{AtomicU64, Ordering},
};

use wrenn_sys::meminfo::MemInfo;

/// Maximum growth since the last snapshot that is kept, in bytes.
const MOST_GROWTH_BYTES: u64 = 16 * 1024 * 1024;

/// Size of the page cache at the last snapshot.
#[derive(Debug, Default)]
pub struct PageCache {
    /// Size at the last snapshot, in bytes; 0 after a boot.
    frozen_bytes: AtomicU64,
}

impl PageCache {
    /// Prepares the page cache for a snapshot: drops it if it has grown, unless `keep` is set, and
    /// records its size.
    ///
    /// # Errors
    /// Fails if the kernel rejects the request to drop the cache.
    pub fn freeze(&self, keep: bool) -> io::Result<()> {
        let most = self.frozen_bytes.load(Ordering::Relaxed) + MOST_GROWTH_BYTES;
        if !keep && cached_bytes() > most {
            // 1 drops the page cache only. The kernel's cache of file metadata is small and soon
            // needed again.
            fs::write("/proc/sys/vm/drop_caches", "1")?;
        }
        self.frozen_bytes.store(cached_bytes(), Ordering::Relaxed);
        Ok(())
    }
}

/// Returns the size of the page cache, in bytes. If the kernel does not report the size, returns
/// more than any guest has, because dropping the cache is always correct.
fn cached_bytes() -> u64 {
    let bytes = MemInfo::read().and_then(|memory| cached(&memory));
    bytes.unwrap_or(u64::MAX / 2)
}

/// Returns `Cached` without `Shmem`, which cannot be dropped, in bytes.
fn cached(memory: &MemInfo) -> io::Result<u64> {
    Ok(memory
        .bytes("Cached")?
        .saturating_sub(memory.bytes("Shmem")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_memory_only_does_not_count() {
        let bytes = |text| cached(&MemInfo::from_text(text)).ok();
        let text = "MemTotal: 500 kB\nCached:      120 kB\nSwapCached: 3 kB\nShmem:   20 kB\n";
        assert_eq!(bytes(text), Some(100 * 1024));
        assert_eq!(bytes("Cached: 1 kB\n"), None);
        assert_eq!(bytes("Cached: x kB\nShmem: 1 kB\n"), None);
    }

    #[test]
    fn this_kernel_tells() {
        let memory = MemInfo::read().expect("Linux");
        assert!(cached(&memory).is_ok_and(|bytes| bytes > 0));
    }
}
