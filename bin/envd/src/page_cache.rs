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
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    parse(&text).unwrap_or(u64::MAX / 2)
}

/// Returns `Cached` without `Shmem`, which cannot be dropped, in bytes. Lines have the form
/// `Name:  NUMBER kB` (proc_meminfo(5)).
fn parse(meminfo: &str) -> Option<u64> {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        let number = line.strip_prefix(':')?.trim().strip_suffix(" kB")?;
        number.parse::<u64>().ok()
    };
    Some(field("Cached")?.saturating_sub(field("Shmem")?) * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_memory_only_does_not_count() {
        let text = "MemTotal: 500 kB\nCached:      120 kB\nSwapCached: 3 kB\nShmem:   20 kB\n";
        assert_eq!(parse(text), Some(100 * 1024));
        assert_eq!(parse("Cached: 1 kB\n"), None);
        assert_eq!(parse("Cached: x kB\nShmem: 1 kB\n"), None);
    }

    #[test]
    fn this_kernel_tells() {
        let text = fs::read_to_string("/proc/meminfo").expect("Linux");
        assert!(parse(&text).is_some_and(|bytes| bytes > 0));
    }
}
