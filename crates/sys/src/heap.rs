//! How much freed memory the C library's allocator keeps for itself.
//!
//! By default each thread gets an arena of its own, and what is freed in one stays with the process. For a process whose
//! memory is frozen, copied and kept on disk, memory that nobody uses is not free of charge. Source: `mallopt(3)`.

/// Freed memory at the heap's end beyond this goes back to the kernel, and larger pieces never come from the heap, bytes.
const THRESHOLD_BYTES: libc::c_int = 128 * 1024;

/// One arena for all threads, and thresholds that do not grow. For a program with little to do at a time; to be called before
/// there is a second thread.
pub fn keep_little() {
    let settings = [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, THRESHOLD_BYTES),
        (libc::M_TRIM_THRESHOLD, THRESHOLD_BYTES),
    ];
    for (name, value) in settings {
        // SAFETY: takes its arguments by value. What is refused stays as it was, which is only less thrifty.
        let _ = unsafe { libc::mallopt(name, value) };
    }
}

/// Gives back whole pages that nobody uses, wherever in the heap they are.
pub fn give_back() {
    // SAFETY: takes its argument by value, and locks the allocator for as long as it takes.
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
    fn what_is_freed_between_used_pieces_goes_back() {
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
