//! What of the page cache goes into a frozen moment.
//!
//! A cache that holds much makes the moment large for nothing: its pages can be read from the disk again. But giving all of
//! it back before every freeze is worse than keeping it: what is read again after a restore lands in other pages of memory,
//! and every one of them is a change that the next moment has to hold. So the cache is given back only when it has grown by
//! more than `MOST_GROWTH_BYTES` since the machine was last frozen; until then it is the same pages with the same content,
//! which cost nothing. How large it was then is in the frozen memory itself: a restored guest need not ask.

use std::{
    fs, io,
    sync::atomic::{AtomicU64, Ordering},
};

/// How much more than at the last freeze may stay.
const MOST_GROWTH_BYTES: u64 = 16 * 1024 * 1024;

/// Remembers how large the cache was.
#[derive(Debug, Default)]
pub struct PageCache {
    /// At the last freeze; 0 since a boot.
    frozen_bytes: AtomicU64,
}

impl PageCache {
    /// The machine is about to be frozen: gives the cache back if it has grown, unless it is to be kept, and remembers how
    /// large it is.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn freeze(&self, keep: bool) -> io::Result<()> {
        let most = self.frozen_bytes.load(Ordering::Relaxed) + MOST_GROWTH_BYTES;
        if !keep && cached_bytes() > most {
            // 1: the page cache only; what the kernel knows of files is small and soon needed again.
            fs::write("/proc/sys/vm/drop_caches", "1")?;
        }
        self.frozen_bytes.store(cached_bytes(), Ordering::Relaxed);
        Ok(())
    }
}

/// Bytes in the page cache. If the kernel does not tell, more than there ever are: giving back is always right.
fn cached_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    parse(&text).unwrap_or(u64::MAX / 2)
}

/// `Cached` without `Shmem`, which cannot be given back. Lines are `Name:  NUMBER kB` (proc_meminfo(5)).
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
