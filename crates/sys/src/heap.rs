//! Limits on the freed memory that the C library's allocator retains.
//!
//! By default each thread gets its own arena, and memory freed in an arena stays with the process.
//! The memory of a guest process is copied and stored on disk by snapshots, so unused memory has a
//! cost. Source: `mallopt(3)`.

/// Trim and mmap threshold, in bytes. Freed memory at the end of the heap beyond this size is
/// returned to the kernel. Larger allocations never come from the heap.
const THRESHOLD_BYTES: libc::c_int = 128 * 1024;

/// Configures the allocator to use one arena for all threads and fixed thresholds.
///
/// Intended for programs with little concurrent work. Must be called before the process starts a
/// second thread.
pub fn keep_little() {
    let settings = [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, THRESHOLD_BYTES),
        (libc::M_TRIM_THRESHOLD, THRESHOLD_BYTES),
    ];
    for (name, value) in settings {
        // SAFETY: `mallopt` takes its arguments by value. A rejected setting keeps its default,
        // which only uses more memory.
        let _ = unsafe { libc::mallopt(name, value) };
    }
}

/// Returns all unused whole pages of the heap to the kernel, wherever in the heap they are.
pub fn give_back() {
    // SAFETY: `malloc_trim` takes its argument by value and holds the allocator's lock while it
    // runs.
    let _ = unsafe { libc::malloc_trim(0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resident_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").expect("readable");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let word = line.expect("there").split_whitespace().next();
        word.and_then(|word| word.parse().ok()).expect("a number")
    }

    #[test]
    fn freed_memory_between_live_allocations_is_returned_to_the_kernel() {
        keep_little();
        let mut pieces: Vec<Option<Vec<u8>>> = (0..20_000).map(|_| Some(vec![1; 1000])).collect();
        let full = resident_kib();
        for (number, piece) in pieces.iter_mut().enumerate() {
            if number % 100 != 0 {
                *piece = None;
            }
        }
        give_back();
        assert!(
            resident_kib() + 10_000 < full,
            "{} of {full}",
            resident_kib()
        );
    }
}
