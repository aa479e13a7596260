//! CPU usage of the guest.

use std::{
    fs, io,
    time::{Duration, Instant},
};

/// Measurement time of the CPU usage if there is no recent sample.
const CPU_WINDOW: Duration = Duration::from_millis(100);
/// Minimum time between two samples. Requests within this time get the last value, because the
/// kernel's ticks are too coarse for a shorter time.
const SHORTEST_WINDOW: Duration = Duration::from_secs(1);
/// Maximum age of a sample that is used as the start of a measurement. An older sample does not
/// describe the present.
const LONGEST_WINDOW: Duration = Duration::from_secs(60);

/// CPU usage since the last request. Nothing is measured without requests, so an idle guest stays
/// idle.
#[derive(Debug, Default)]
pub struct CpuUse(tokio::sync::Mutex<Option<CpuSample>>);

#[derive(Debug, Clone, Copy)]
struct CpuSample {
    at: Instant,
    times: (u64, u64),
    percent: f64,
}

impl CpuUse {
    /// Returns the usage in percent of all CPUs. Measures it, unless the last measurement is
    /// recent.
    ///
    /// # Errors
    /// Returns the kernel's error for `/proc/stat`.
    pub async fn percent(&self) -> io::Result<f64> {
        let read = || fs::read_to_string("/proc/stat");
        let mut last = self.0.lock().await;
        let before = match *last {
            Some(last) if last.at.elapsed() < SHORTEST_WINDOW => return Ok(last.percent),
            Some(last) if last.at.elapsed() < LONGEST_WINDOW => last.times,
            _ => {
                let times = cpu_times(&read()?);
                tokio::time::sleep(CPU_WINDOW).await;
                times
            }
        };
        let times = cpu_times(&read()?);
        let percent = used_percent(before, times);
        let at = Instant::now();
        *last = Some(CpuSample { at, times, percent });
        Ok(percent)
    }
}

/// Returns busy and total ticks since boot, from the first line of `/proc/stat`. Fields 4 and 5 of
/// that line are idle time (`proc_stat(5)`).
fn cpu_times(stat: &str) -> (u64, u64) {
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .take(8)
        .map(|field| field.parse().unwrap_or(0))
        .collect();
    let all: u64 = fields.iter().sum();
    let idle: u64 = fields.iter().skip(3).take(2).sum();
    (all - idle, all)
}

/// Returns the usage in percent of all CPUs, with two decimal places.
fn used_percent(before: (u64, u64), after: (u64, u64)) -> f64 {
    let busy = u32::try_from(after.0.saturating_sub(before.0)).unwrap_or(u32::MAX);
    let all = u32::try_from(after.1.saturating_sub(before.1)).unwrap_or(u32::MAX);
    if all == 0 {
        return 0.0;
    }
    (f64::from(busy) / f64::from(all) * 10_000.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_the_kernel_is_parsed() {
        let stat = "cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 1 1 1\n";
        assert_eq!(cpu_times(stat), (150, 1000));
        assert!((used_percent((150, 1000), (200, 1200)) - 25.0).abs() < 0.001);
        assert!(used_percent((1, 1), (1, 1)).abs() < 0.001);
    }
}
