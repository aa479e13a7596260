//! Processor time of the VMM, from `/proc/PID/task/*/schedstat` (`Documentation/scheduler/
//! sched-stats.rst` of the kernel).

use std::{fs, io};

use wrenn_proto::supervise::VmmTime;

/// Returns the sum over all threads of a process. `None` if the process is gone, or if the kernel
/// keeps no such statistics.
pub(crate) fn read(pid: u32) -> Option<VmmTime> {
    sum(pid).ok()
}

fn sum(pid: u32) -> io::Result<VmmTime> {
    let (mut running_ns, mut waiting_ns) = (0_u64, 0_u64);
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = match fs::read_to_string(task?.path().join("schedstat")) {
            // The thread has ended in the meantime.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            read => read?,
        };
        let (running, waiting) = parse(&text).ok_or(io::ErrorKind::InvalidData)?;
        running_ns = running_ns.saturating_add(running);
        waiting_ns = waiting_ns.saturating_add(waiting);
    }
    Ok(VmmTime {
        running_ms: running_ns / 1_000_000,
        waiting_ms: waiting_ns / 1_000_000,
    })
}

/// Parses the three numbers of a `schedstat` file. Returns the nanoseconds on a processor and the
/// nanoseconds on a run queue.
fn parse(text: &str) -> Option<(u64, u64)> {
    let mut numbers = text.split_ascii_whitespace();
    let running = numbers.next()?.parse().ok()?;
    let waiting = numbers.next()?.parse().ok()?;
    Some((running, waiting))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scheduler_statistics_are_parsed() {
        assert_eq!(parse("7000000 2000000 5\n"), Some((7_000_000, 2_000_000)));
        assert_eq!(parse("7000000"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn processor_time_grows_for_a_busy_process_and_is_absent_for_a_dead_one() {
        let pid = std::process::id();
        let total = |time: VmmTime| time.running_ms + time.waiting_ms;
        let before = total(read(pid).expect("this process has threads"));
        let began = std::time::Instant::now();
        while began.elapsed() < std::time::Duration::from_millis(50) {
            std::hint::spin_loop();
        }
        let after = total(read(pid).expect("this process has threads"));
        assert!(after >= before + 20, "{before} -> {after}");
        assert_eq!(read(u32::MAX), None);
    }
}
