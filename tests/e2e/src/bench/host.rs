//! Cost of sandboxes on the host: memory of each process, and CPU of many idle sandboxes.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::{Value, json};

use super::{freed, median, resume::create, rounded};
use crate::{Sandbox, Service, host::resident_kb};

const IDLE_SANDBOXES: usize = 50;
const IDLE_SECONDS: u64 = 20;

/// Measures the resident memory of each kind of process with 1 and with 10 sandboxes, and what is
/// left of memory that a guest has freed.
///
/// # Errors
/// A sandbox does not start.
pub async fn memory(service: &Service) -> Result<Value> {
    let mut report = serde_json::Map::new();
    for count in [1, 10] {
        let sandboxes = create_many(service, count).await?;
        let (mut supervisors, mut vmms, mut guests) = (Vec::new(), Vec::new(), Vec::new());
        for sandbox in &sandboxes {
            for (pid, line) in processes_of(sandbox.id()) {
                let resident = Resident::of(pid)?;
                if line.contains(" supervise ") {
                    supervisors.push(resident.own_kb);
                } else if line.contains("qemu-system") {
                    vmms.push(resident.own_kb);
                    guests.push(resident.guest_kb);
                }
            }
        }
        report.insert(
            format!("with_{count}"),
            json!({
                "service_resident_mb": rounded(megabytes(resident_kb(service.pid())?)),
                "supervisor_resident_mb": rounded(median(supervisors) / 1024.0),
                "vmm_without_guest_memory_mb": rounded(median(vmms) / 1024.0),
                "guest_memory_touched_mb": rounded(median(guests) / 1024.0),
            }),
        );
        destroy_all(sandboxes).await?;
    }
    report.insert("limit_supervisor_resident_mb".into(), json!(12));
    report.insert("freed_900_mb".into(), freed::freed(service).await?);
    Ok(Value::Object(report))
}

/// Measures the CPU usage of all host processes while many sandboxes are idle, in percent of one
/// CPU.
///
/// # Errors
/// A sandbox does not start.
pub async fn idle(service: &Service) -> Result<Value> {
    let sandboxes = create_many(service, IDLE_SANDBOXES).await?;
    // A restore causes later work (clock synchronisation, forwarding) that is not part of the idle
    // cost.
    tokio::time::sleep(Duration::from_secs(30)).await;
    let before = cpu_seconds(service, &sandboxes)?;
    tokio::time::sleep(Duration::from_secs(IDLE_SECONDS)).await;
    let after = cpu_seconds(service, &sandboxes)?;
    let report: serde_json::Map<_, _> = before
        .iter()
        .zip(&after)
        .map(|((name, before), (_, after))| {
            let percent =
                (after - before) / Duration::from_secs(IDLE_SECONDS).as_secs_f64() * 100.0;
            ((*name).to_owned(), json!(rounded(percent)))
        })
        .collect();
    let count = sandboxes.len();
    destroy_all(sandboxes).await?;
    Ok(json!({ "sandboxes": count, "cpu_percent_of_one": report, "seconds": IDLE_SECONDS }))
}

async fn create_many(service: &Service, count: usize) -> Result<Vec<Sandbox<'_>>> {
    stream::iter(0..count)
        .map(|_| async {
            // The template's own size, as in most creates: restored, not booted.
            let sandbox = create(service, json!({ "timeout_sec": 0 })).await?;
            sandbox.until_status("running").await?;
            sandbox.exec("true", &[]).await?;
            anyhow::Ok(sandbox)
        })
        .buffer_unordered(2)
        .try_collect()
        .await
}

async fn destroy_all(sandboxes: Vec<Sandbox<'_>>) -> Result<()> {
    for sandbox in sandboxes {
        sandbox.destroy().await?;
    }
    Ok(())
}

/// Returns the processes whose command line contains the id of a sandbox.
pub(super) fn processes_of(id: &str) -> Vec<(u32, String)> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return vec![];
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains(id).then_some((pid, line))
        })
        .collect()
}

/// Resident memory of a process, in kB.
#[derive(Default)]
struct Resident {
    /// Memory without guest memory, but with the pages of the program.
    own_kb: f64,
    /// Guest memory: the mapping of the snapshot's memory file.
    guest_kb: f64,
}

impl Resident {
    /// Reads `smaps` (`proc_pid_smaps(5)`). The first line of a mapping is an address range; the
    /// following lines are fields.
    fn of(pid: u32) -> Result<Self> {
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        let mut resident = Self::default();
        let mut in_guest = false;
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if !first.ends_with(':') {
                in_guest = line.contains("memfd:snapshot-memory");
                continue;
            }
            let mut kb = || -> Result<f64> { Ok(words.next().context("no number")?.parse()?) };
            match (first, in_guest) {
                ("Rss:", true) => resident.guest_kb += kb()?,
                ("Rss:", false) => resident.own_kb += kb()?,
                _ => {}
            }
        }
        Ok(resident)
    }
}

pub(super) fn megabytes(kb: u64) -> f64 {
    u32::try_from(kb).map_or(f64::NAN, f64::from) / 1024.0
}

fn cpu_seconds(service: &Service, sandboxes: &[Sandbox<'_>]) -> Result<Vec<(&'static str, f64)>> {
    let mut supervisors = 0.0;
    let mut vmms = 0.0;
    for sandbox in sandboxes {
        for (pid, line) in processes_of(sandbox.id()) {
            let seconds = cpu_of(pid)?;
            if line.contains(" supervise ") {
                supervisors += seconds;
            } else {
                vmms += seconds;
            }
        }
    }
    Ok(vec![
        ("service", cpu_of(service.pid())?),
        ("supervisors", supervisors),
        ("vmms", vmms),
    ])
}

/// Returns the user and system time of a process, in seconds (`proc(5)`, fields 14 and 15, counted
/// after the last `)`).
fn cpu_of(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<_> = stat
        .rsplit(')')
        .next()
        .context("no fields in stat")?
        .split_whitespace()
        .collect();
    let ticks =
        |index: usize| -> Result<f64> { Ok(fields.get(index).context("no field")?.parse()?) };
    let ticks_a_second = 100.0;
    Ok((ticks(11)? + ticks(12)?) / ticks_a_second)
}
