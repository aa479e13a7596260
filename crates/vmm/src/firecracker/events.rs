//! Failures that Firecracker reports in its metrics.
//!
//! Firecracker has no events. It writes a line of JSON with all counters every minute, and when it
//! ends. Only the counters that mean a failure are read, and logged. Source: `docs/metrics.md` in
//! Firecracker's repository, and the fields of a line that version 1.16 writes.

use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    net::unix::pipe,
};

/// Maximum length of a line, in bytes. A line of version 1.16 has about 15 kB.
const MAX_LINE_BYTES: usize = 256 * 1024;

/// Counters that mean a failure, since the line before. Others are ignored.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Failures {
    seccomp: Seccomp,
    vmm: Vmm,
    vcpu: Vcpu,
    block: Block,
    net: Net,
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Seccomp {
    /// Calls that Firecracker's own filter denied.
    num_faults: u64,
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Vmm {
    panic_count: u64,
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Vcpu {
    /// Exits of a virtual CPU that could not be handled.
    failures: u64,
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Block {
    /// Requests of the guest that failed, for example because the host's disk is full.
    execute_fails: u64,
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Net {
    tap_read_fails: u64,
    tap_write_fails: u64,
}

impl Failures {
    /// Parses a line. Returns `None` if it is not a line of metrics, or reports no failure.
    fn parse(line: &[u8]) -> Option<Self> {
        let failures: Self = serde_json::from_slice(line).ok()?;
        (failures != Self::default()).then_some(failures)
    }

    fn log(&self) {
        tracing::warn!(
            denied_calls = self.seccomp.num_faults,
            panics = self.vmm.panic_count,
            vcpu_failures = self.vcpu.failures,
            disk_failures = self.block.execute_fails,
            tap_read_failures = self.net.tap_read_fails,
            tap_write_failures = self.net.tap_write_fails,
            "Firecracker reported failures"
        );
    }
}

/// Reads the metrics until Firecracker exits, so that the pipe never fills up.
pub(super) fn log_failures(metrics: pipe::Receiver) {
    tokio::spawn(async move {
        let mut lines = BufReader::new(metrics);
        let mut line = Vec::new();
        loop {
            line.clear();
            let mut limited = (&mut lines).take(MAX_LINE_BYTES as u64);
            match limited.read_until(b'\n', &mut line).await {
                Ok(0) | Err(_) => return,
                // The parts of a line that is too long are not JSON.
                Ok(_) => {}
            }
            if let Some(failures) = Failures::parse(&line) {
                failures.log();
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_counters_of_failures_are_read() {
        let quiet = br#"{"utc_timestamp_ms":1,"block":{"execute_fails":0,"read_bytes":4096},
            "net":{"tx_bytes_count":10},"vmm":{"panic_count":0},"seccomp":{"num_faults":0}}"#;
        assert_eq!(Failures::parse(quiet), None);
        let full = br#"{"block":{"execute_fails":3,"read_bytes":4096},"seccomp":{"num_faults":1}}"#;
        let failures = Failures::parse(full).expect("failures");
        assert_eq!(failures.block.execute_fails, 3);
        assert_eq!(failures.seccomp.num_faults, 1);
        assert_eq!(failures.net, Net::default());
    }

    #[test]
    fn a_line_that_is_not_metrics_is_ignored() {
        for line in [
            &b"garbage"[..],
            b"",
            b"[1]",
            b"{\"block\":7}",
            &[0xff, 0xfe],
        ] {
            assert_eq!(Failures::parse(line), None);
        }
    }
}
