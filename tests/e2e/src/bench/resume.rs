//! Cost of snapshots and restores, compared with a cold boot and with a plain write, with and
//! without prefetch.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};

use super::{Series, probe, rounded};
use crate::{Sandbox, Service};

const ROUNDS: usize = 7;
/// Differs from the template's size, so that the sandbox has to boot.
const COLD_MEMORY_MB: u32 = 520;
const STEPS: [&str; 3] = ["prepared_ms", "vmm_started_ms", "envd_ms"];

/// Measures the time from the create request to the response of a first program, for a booted
/// sandbox and for a sandbox restored from the template snapshot.
///
/// # Errors
/// A sandbox does not start.
pub async fn restore(service: &Service) -> Result<Value> {
    let programs: [(&str, &str, &[&str]); 2] = [
        ("true", "true", &[]),
        ("python3", "python3", &["-c", "print(1)"]),
    ];
    let mut series = Series::default();
    for _ in 0..ROUNDS {
        for (name, program, args) in programs {
            let sizes = [
                ("cold", json!({ "memory_mb": COLD_MEMORY_MB })),
                ("restored", json!({ "timeout_sec": 0 })),
            ];
            for (kind, body) in sizes {
                let begun = Instant::now();
                let sandbox = create(service, body).await?;
                sandbox.exec(program, args).await?;
                series.add(&format!("{kind}_{name}_ms"), millis(begun));
                if kind == "restored" {
                    note_pages(&mut series, name, service, &sandbox).await?;
                    note_steps(&mut series, &sandbox).await?;
                }
                sandbox.destroy().await?;
            }
        }
    }
    let ratio = |name: &str| {
        let (cold, restored) = (format!("cold_{name}_ms"), format!("restored_{name}_ms"));
        rounded(series.median(&cold) / series.median(&restored))
    };
    let ratios = json!({ "true": ratio("true"), "python3": ratio("python3") });
    let mut report = series.report();
    report["times_faster_than_cold"] = ratios;
    report["limit_times_faster_than_cold"] = json!(8);
    report["rounds"] = json!(ROUNDS);
    Ok(report)
}

/// Measures a pause, compared with a plain write of the same number of bytes, and a resume with and
/// without prefetch.
///
/// # Errors
/// A sandbox does not start.
pub async fn pause_and_resume(service: &Service) -> Result<Value> {
    let mut series = Series::default();
    let sandbox = create(service, json!({ "timeout_sec": 0 })).await?;
    // From here on, Python is in memory and in the page cache, as in a sandbox in use.
    python(&sandbox).await?;
    for round in 0..=ROUNDS {
        pause(&mut series, service, &sandbox).await?;
        // The first resume records the needed pages, and the second one prefetches them.
        let snapshot = newest(&service.dir().join("snapshots/snapshots"))?;
        fs::remove_file(snapshot.join("working-set")).ok();
        resume(&mut series, "without_prefetch", service, &sandbox, round).await?;
        pause(&mut series, service, &sandbox).await?;
        resume(&mut series, "with_prefetch", service, &sandbox, round).await?;
    }
    sandbox.destroy().await?;
    let faster = 1.0
        - series.median("with_prefetch_python3_ms") / series.median("without_prefetch_python3_ms");
    let beside = series.median("pause_ms") / series.median("dd_of_the_same_bytes_ms");
    let mut report = series.report();
    report["share_saved_by_prefetch"] = json!(rounded(faster));
    report["limit_share_saved_by_prefetch"] = json!(0.4);
    report["limit_with_prefetch_demand_faults"] = json!(150);
    report["pause_beside_dd"] = json!(rounded(beside));
    report["rounds"] = json!(ROUNDS);
    Ok(report)
}

async fn pause(series: &mut Series, service: &Service, sandbox: &Sandbox<'_>) -> Result<()> {
    let begun = Instant::now();
    post(service, &sandbox.path("/pause")).await?;
    series.add("pause_ms", millis(begun));
    let file = newest(&service.dir().join("snapshots/memory"))?;
    let bytes = fs::metadata(&file)?.len();
    series.add("generation_bytes", as_f64(bytes));
    let begun = Instant::now();
    let copy = service.dir().join("dd");
    let status = Command::new("dd")
        .arg(format!("if={}", file.display()))
        .arg(format!("of={}", copy.display()))
        .args(["bs=1M", "conv=fsync", "status=none"])
        .status()?;
    ensure!(status.success(), "`dd` failed: {status}");
    series.add("dd_of_the_same_bytes_ms", millis(begun));
    Ok(fs::remove_file(copy)?)
}

/// Round 0 is a warm-up.
async fn resume(
    series: &mut Series,
    kind: &str,
    service: &Service,
    sandbox: &Sandbox<'_>,
    round: usize,
) -> Result<()> {
    let begun = Instant::now();
    post(service, &sandbox.path("/resume")).await?;
    let resumed = millis(begun);
    python(sandbox).await?;
    let answered = millis(begun);
    if round > 0 {
        series.add(&format!("{kind}_resume_ms"), resumed);
        series.add(&format!("{kind}_python3_ms"), answered);
        note_pages(series, kind, service, sandbox).await?;
    }
    Ok(())
}

async fn note_pages(
    series: &mut Series,
    prefix: &str,
    service: &Service,
    sandbox: &Sandbox<'_>,
) -> Result<()> {
    let pages = probe::pager(service, sandbox).await?;
    let figures = [
        ("demand_faults", pages.faults),
        ("zero_faults", pages.zero_faults),
        ("pages_loaded", pages.pages_loaded),
        ("pages_prefetched", pages.pages_prefetched),
        ("pages_in_snapshot", pages.pages_stored),
    ];
    for (name, value) in figures {
        series.add(&format!("{prefix}_{name}"), as_f64(value));
    }
    Ok(())
}

async fn note_steps(series: &mut Series, sandbox: &Sandbox<'_>) -> Result<()> {
    let record = sandbox.record().await?;
    for step in STEPS {
        let value = record["boot"][step].as_f64().unwrap_or(f64::NAN);
        series.add(&format!("restored_reached_{step}"), value);
    }
    Ok(())
}

async fn python(sandbox: &Sandbox<'_>) -> Result<()> {
    let output = sandbox.exec("python3", &["-c", "print(1)"]).await?;
    ensure!(output.stdout == "1\n", "{output:?}");
    Ok(())
}

pub(super) async fn create(service: &Service, body: Value) -> Result<Sandbox<'_>> {
    let (status, reply) = service.json(Method::POST, "/v1/sandboxes", &body).await?;
    ensure!(status.is_success(), "{status}: {reply}");
    let id = reply["id"].as_str().context("no id")?.to_owned();
    Ok(Sandbox::new(service, id))
}

pub(super) async fn post(service: &Service, path: &str) -> Result<Value> {
    let (status, reply) = service.json(Method::POST, path, &json!({})).await?;
    ensure!(status.is_success(), "{path}: {status}: {reply}");
    Ok(reply)
}

pub(super) fn newest(dir: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(dir)?.flatten();
    let newest = entries
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .max();
    Ok(newest
        .with_context(|| format!("{} is empty", dir.display()))?
        .1)
}

pub(super) fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

pub(super) fn as_f64(value: u64) -> f64 {
    u32::try_from(value).map_or(f64::NAN, f64::from)
}
