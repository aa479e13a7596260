//! Check of the timer that the kernel calibrated, before any program relies on it.
//!
//! Without a TSC deadline timer, Linux measures how fast the local APIC timer counts: it reads
//! the counter twice, 25 ticks apart, while it polls the TSC. Both counters advance while the host
//! does not run the virtual CPU. A pause of the virtual CPU at the first reading makes the timer
//! look slow, and a pause at the second reading makes it look fast. After a pause of 0.1 s at the
//! first reading, nothing is left to measure: the kernel logs "APIC frequency too slow, disabling
//! apic timer" and continues without any clock event device. The guest then hangs at its first
//! sleep. The local APIC timers of QEMU and of KVM count at 1 GHz (`hw/intc/apic.c` of QEMU,
//! `APIC_BUS_CYCLE_NS` of KVM), so the result can be checked exactly: `/proc/timer_list` shows the
//! multiplier in use. Decision record 0016 contains the proof of the cause.

use std::{fs, io, path::Path};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use wrenn_proto::supervise::marks;

/// Frequency at which the kernel drives the local APIC timer: the bus, divided by 16.
const LAPIC_TIMER_HZ: f64 = 1e9 / 16.0;

/// Parameter of the kernel command line that sets the tolerance, in percent.
const TOLERANCE_PARAMETER: &str = marks::TIMER_TOLERANCE;

/// Default tolerance, in percent: a factor of two in either direction.
const DEFAULT_TOLERANCE_PERCENT: f64 = 100.0;

/// Checks the timer of every CPU. Mounts the proc file system on `/proc`, which must be empty, and
/// unmounts it again.
///
/// # Errors
/// Returns the reason for which the boot must end. A file that cannot be read is not an error.
pub(crate) fn check() -> Result<(), String> {
    match read() {
        Ok((timers, command_line)) => judge(&timers, tolerance_percent(&command_line)),
        Err(_) => Ok(()),
    }
}

fn read() -> io::Result<(String, String)> {
    if !Path::new("/proc").exists() {
        fs::create_dir("/proc")?;
    }
    mount("proc", "/proc", "proc", MountFlags::NOSUID, None)?;
    let timers = fs::read_to_string("/proc/timer_list");
    let command_line = fs::read_to_string("/proc/cmdline");
    unmount("/proc", UnmountFlags::DETACH)?;
    Ok((timers?, command_line?))
}

fn tolerance_percent(command_line: &str) -> f64 {
    let mut words = command_line.split_ascii_whitespace();
    let value = words.find_map(|word| word.strip_prefix(TOLERANCE_PARAMETER)?.parse().ok());
    value.unwrap_or(DEFAULT_TOLERANCE_PERCENT)
}

/// Checks the content of `/proc/timer_list`.
fn judge(timers: &str, tolerance_percent: f64) -> Result<(), String> {
    let factor = 1.0 + tolerance_percent / 100.0;
    for timer in per_cpu(timers) {
        let Some(device) = timer.device else {
            return Err(format!("CPU {} has no clock event device", timer.cpu));
        };
        // No other device is calibrated in this way.
        let Some(hz) = timer.hz.filter(|_| device == "lapic") else {
            continue;
        };
        let ratio = hz / LAPIC_TIMER_HZ;
        if ratio > factor || ratio < 1.0 / factor {
            return Err(format!(
                "the kernel calibrated the timer of CPU {} to {ratio:.3} of its frequency",
                timer.cpu
            ));
        }
    }
    Ok(())
}

/// Clock event device of a CPU.
#[derive(Debug, PartialEq)]
struct Timer<'a> {
    cpu: &'a str,
    /// Name of the device, or `None` if the CPU has none.
    device: Option<&'a str>,
    /// Ticks per second that the kernel assumes.
    hz: Option<f64>,
}

/// Parses the blocks that begin with `Per CPU device:`. `mult` and `shift` convert nanoseconds to
/// ticks: `ticks = ns * mult >> shift`.
fn per_cpu(timers: &str) -> Vec<Timer<'_>> {
    let mut blocks = timers.split("Per CPU device:");
    blocks.next();
    blocks.map(timer_of).collect()
}

fn timer_of(block: &str) -> Timer<'_> {
    let field = |name: &str| {
        let mut lines = block.lines();
        lines.find_map(|line| line.trim().strip_prefix(name).map(str::trim))
    };
    let number = |name: &str| field(name)?.parse::<f64>().ok();
    let hz = || Some(number("mult:")? * 1e9 / number("shift:")?.exp2());
    Timer {
        cpu: block.lines().next().unwrap_or_default().trim(),
        device: field("Clock Event Device:").filter(|name| *name != "<NULL>"),
        hz: hz(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Output of Linux 6.1, shortened. `@` stands for the multiplier.
    const LIST: &str = "\
Timer List Version: v0.9
HRTIMER_MAX_CLOCK_BASES: 8
now at 478014316 nsecs

cpu: 0
 clock 0:
  .base:               ffff88800f61f080

Tick Device: mode:     1
Broadcast device
Clock Event Device: <NULL>
tick_broadcast_mask: 0
tick_broadcast_oneshot_mask: 0

Tick Device: mode:     1
Per CPU device: 0
Clock Event Device: lapic
 max_delta_ns:   34359738330
 min_delta_ns:   1000
 mult:           @
 shift:          32
 mode:           3
 next_event:     480000000 nsecs
 set_next_event: lapic_next_event
";

    fn list(mult: &str) -> String {
        LIST.replace('@', mult)
    }

    #[test]
    fn accurate_timer_passes() {
        assert_eq!(judge(&list("268435456"), 5.0), Ok(()));
        assert_eq!(judge(&list("260468291"), 5.0), Ok(()));
        assert_eq!(judge(&list("450000000"), 100.0), Ok(()));
    }

    #[test]
    fn timer_that_is_too_slow_or_too_fast_fails() {
        // Results on a busy host: 7032355 and 1443562 instead of 4000000.
        for (mult, ratio) in [("471934464", "1.758"), ("96875384", "0.361")] {
            let error = judge(&list(mult), 50.0).expect_err("out of range");
            assert!(error.contains(ratio), "{error}");
        }
    }

    #[test]
    fn a_cpu_without_a_timer_is_named() {
        let dead = list("1").replace(
            "Per CPU device: 0\nClock Event Device: lapic",
            "Per CPU device: 0\nClock Event Device: <NULL>",
        );
        let error = judge(&dead, 100.0).expect_err("dead");
        assert_eq!(error, "CPU 0 has no clock event device");
    }

    #[test]
    fn timer_without_calibration_is_not_checked() {
        let deadline = list("1").replace("Device: lapic", "Device: lapic-deadline");
        assert_eq!(judge(&deadline, 1.0), Ok(()));
        assert_eq!(judge("", 1.0), Ok(()));
    }

    #[test]
    fn every_cpu_is_checked() {
        let second = list("1").replace("Per CPU device: 0", "Per CPU device: 1");
        let both = format!("{}\n{second}", list("268435456"));
        let error = judge(&both, 100.0).expect_err("the second is dead");
        assert!(error.contains("CPU 1"), "{error}");
    }

    #[test]
    fn the_command_line_sets_the_tolerance() {
        assert!((tolerance_percent("quiet wrenn.timer_tolerance=5 x") - 5.0).abs() < 1e-9);
        assert!((tolerance_percent("quiet") - 100.0).abs() < 1e-9);
    }
}
