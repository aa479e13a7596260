//! The same guest in each VMM that this machine can run: boot, restore, pause, resume, memory; and
//! the cost of a start and a restore compared with the VMM alone.

mod bare;

use std::{fs, path::PathBuf, time::Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use wrenn_proto::supervise::{MachineStatus, SupervisorSpec, files};

use super::{
    Series, probe,
    resume::{as_f64, create, millis, newest, post},
    rounded,
};
use crate::{Sandbox, Service, vmms::Vmm};

const ROUNDS: usize = 7;

/// Number of sandboxes of one snapshot whose memory is measured.
const COPIES: usize = 3;

/// Limit of what a restore costs on top of the VMM alone, in milliseconds.
const LIMIT_ON_TOP_MS: u32 = 10;

/// Measures each VMM. A VMM that this machine cannot run is reported with the reason.
///
/// # Errors
/// A sandbox does not start.
pub async fn vmm(_service: &Service) -> Result<Value> {
    let mut report = serde_json::Map::new();
    for (name, vmm) in [("qemu", Vmm::qemu()), ("firecracker", Vmm::firecracker())] {
        let measured = match vmm {
            Ok(vmm) => measure(&vmm).await?,
            Err(why) => json!({ "ignored": format!("{why:#}") }),
        };
        report.insert(name.to_owned(), measured);
    }
    report.insert("rounds".to_owned(), json!(ROUNDS));
    report.insert("limit_restore_on_top_ms".to_owned(), json!(LIMIT_ON_TOP_MS));
    Ok(Value::Object(report))
}

async fn measure(vmm: &Vmm) -> Result<Value> {
    let service = vmm.service().await?;
    let mut series = Series::default();
    boot(&mut series, vmm, &service).await?;
    for _ in 0..ROUNDS {
        restore(&mut series, vmm, &service).await?;
    }
    generations(&mut series, vmm, &service).await?;
    share(&mut series, vmm, &service).await?;
    Ok(series.report())
}

async fn boot(series: &mut Series, vmm: &Vmm, service: &Service) -> Result<()> {
    let sandbox = vmm.boot(service).await?;
    let status = probe::status(service, &sandbox).await?;
    for (step, reached) in [
        ("boot_to_vmm_answer_ms", status.vmm_started_ms),
        ("boot_to_init_ms", status.kernel_ms),
        ("boot_to_guest_agent_ms", status.init_ms),
    ] {
        series.add(step, milliseconds(reached));
    }
    sandbox.destroy().await
}

/// Restores a sandbox, and restores the same snapshot with the VMM alone.
async fn restore(series: &mut Series, vmm: &Vmm, service: &Service) -> Result<()> {
    let begun = Instant::now();
    let sandbox = create(service, json!({ "timeout_sec": 0 })).await?;
    sandbox.until_status("running").await?;
    series.add("create_ms", millis(begun));
    vmm.ensure_used(sandbox.id())?;
    let begun = Instant::now();
    sandbox.exec("true", &[]).await?;
    series.add("first_command_ms", millis(begun));
    let status = probe::status(service, &sandbox).await?;
    let ours = milliseconds(status.restored_ms);
    series.add(
        "restore_to_vmm_answer_ms",
        milliseconds(status.vmm_started_ms),
    );
    series.add("restore_to_resumed_ms", ours);
    note_pages(series, &status)?;
    let alone = bare::start(&spec(service, &sandbox)?)?;
    series.add("vmm_alone_to_answer_ms", alone.answered_ms);
    if let Some(resumed_ms) = alone.resumed_ms {
        series.add("vmm_alone_to_resumed_ms", resumed_ms);
        series.add("restore_on_top_ms", ours - resumed_ms);
    }
    sandbox.destroy().await
}

fn note_pages(series: &mut Series, status: &MachineStatus) -> Result<()> {
    let pages = status.pager.as_ref().context("the VM was not restored")?;
    series.add("demand_faults", as_f64(pages.faults));
    series.add("pages_prefetched", as_f64(pages.pages_prefetched));
    Ok(())
}

/// Pauses and resumes a sandbox several times.
async fn generations(series: &mut Series, vmm: &Vmm, service: &Service) -> Result<()> {
    let sandbox = vmm.restore(service).await?;
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        post(service, &sandbox.path("/pause")).await?;
        series.add("pause_ms", millis(begun));
        let file = newest(&service.dir().join("snapshots/memory"))?;
        series.add("pause_memory_bytes", as_f64(fs::metadata(&file)?.len()));
        let begun = Instant::now();
        post(service, &sandbox.path("/resume")).await?;
        series.add("resume_ms", millis(begun));
        sandbox.exec("true", &[]).await?;
        series.add("resume_to_first_command_ms", millis(begun));
    }
    sandbox.destroy().await
}

/// Measures the memory of VMMs whose VMs were restored from one snapshot.
async fn share(series: &mut Series, vmm: &Vmm, service: &Service) -> Result<()> {
    let mut sandboxes = Vec::new();
    for _ in 0..COPIES {
        let sandbox = vmm.restore(service).await?;
        sandbox.exec("true", &[]).await?;
        sandboxes.push(sandbox);
    }
    for sandbox in &sandboxes {
        let status = probe::status(service, sandbox).await?;
        series.add("vmm_pss_mb_of_3", pss_kb(status.vmm_pid)? / 1024.0);
    }
    for sandbox in sandboxes {
        sandbox.destroy().await?;
    }
    Ok(())
}

/// Returns the proportional share of a process's memory, in KiB (`proc_pid_smaps(5)`).
fn pss_kb(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    Ok(number.context("no Pss")?.parse()?)
}

fn spec(service: &Service, sandbox: &Sandbox<'_>) -> Result<SupervisorSpec> {
    let dir: PathBuf = service.dir().join("sandboxes").join(sandbox.id());
    let spec: SupervisorSpec = serde_json::from_slice(&fs::read(dir.join(files::SPEC))?)?;
    ensure!(spec.restore.is_some(), "the sandbox was not restored");
    Ok(spec)
}

fn milliseconds(reached: Option<u32>) -> f64 {
    reached.map_or(f64::NAN, |ms| rounded(f64::from(ms)))
}
