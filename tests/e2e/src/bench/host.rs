//! What sandboxes cost the host: memory of each process, and CPU of many that idle.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::{Value, json};

use super::{median, rounded};
use crate::{Sandbox, Service, host::resident_kb};

const IDLE_SANDBOXES: usize = 50;
const IDLE_SECONDS: u64 = 20;

/// Resident memory of each kind of process with 1 and with 10 sandboxes.
///
/// # Errors
/// If a sandbox does not come up.
pub async fn memory(service: &Service) -> Result<Value> {
    let mut report = serde_json::Map::new();
    for count in [1, 10] {
        let sandboxes = create_many(service, count).await?;
        let mut supervisors = Vec::new();
        let mut vmms = Vec::new();
        for sandbox in &sandboxes {
            for (pid, line) in processes_of(sandbox.id()) {
                if line.contains(" supervise ") {
                    supervisors.push(private_kb(pid)?);
                } else if line.contains("qemu-system") {
                    vmms.push(private_kb(pid)?);
                }
            }
        }
        report.insert(
            format!("with_{count}"),
            json!({
                "service_resident_mb": rounded(megabytes(resident_kb(service.pid())?)),
                "supervisor_resident_mb": rounded(median(supervisors) / 1024.0),
                "vmm_without_guest_memory_mb": rounded(median(vmms) / 1024.0),
            }),
        );
        destroy_all(sandboxes).await?;
    }
    report.insert("limit_supervisor_resident_mb".into(), json!(12));
    Ok(Value::Object(report))
}

/// CPU of the whole host side while many sandboxes do nothing, in percent of one CPU.
///
/// # Errors
/// If a sandbox does not come up.
pub async fn idle(service: &Service) -> Result<Value> {
    let sandboxes = create_many(service, IDLE_SANDBOXES).await?;
    // Boots leave work behind (disk growth, clock synchronisation): it is not what idle costs.
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
        .map(|_| service.create_with(json!({ "memory_mb": 256 })))
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

/// Processes whose command line names a sandbox.
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

/// Resident memory of a process that is not shared memory, kB: without the guest's.
fn private_kb(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Result<f64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line
            .context("a memory field")?
            .trim()
            .trim_end_matches(" kB")
            .trim();
        Ok(number.parse()?)
    };
    Ok(field("RssAnon:")? + field("RssFile:")?)
}

fn megabytes(kb: u64) -> f64 {
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

/// User and system time of a process, seconds. `proc(5)`: fields 14 and 15, counted behind the last `)`.
fn cpu_of(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<_> = stat
        .rsplit(')')
        .next()
        .context("fields")?
        .split_whitespace()
        .collect();
    let ticks =
        |index: usize| -> Result<f64> { Ok(fields.get(index).context("a field")?.parse()?) };
    let ticks_a_second = 100.0;
    Ok((ticks(11)? + ticks(12)?) / ticks_a_second)
}
