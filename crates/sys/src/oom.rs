//! Priority of this process for the kernel's OOM killer (`proc_pid_oom_score_adj(5)`).

use std::{fs, io};

const PATH: &str = "/proc/self/oom_score_adj";

/// Sets the priority, from -1000 (never killed) to 1000 (killed first). Lowering it requires
/// `CAP_SYS_RESOURCE`.
///
/// # Errors
/// Returns the kernel's error.
pub fn set_score_adj(value: i32) -> io::Result<()> {
    fs::write(PATH, value.to_string())
}

/// Sets the priority, unless it was set before by the manager of this process.
///
/// # Errors
/// Same as [`set_score_adj`].
pub fn set_score_adj_if_unset(value: i32) -> io::Result<()> {
    if fs::read_to_string(PATH)?.trim() == "0" {
        set_score_adj(value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_priority_that_was_set_before_is_kept() {
        // Raising is always permitted.
        set_score_adj(7).expect("set");
        set_score_adj_if_unset(9).expect("read");
        let now = fs::read_to_string(PATH).expect("read");
        assert_eq!(now.trim(), "7");
    }
}
