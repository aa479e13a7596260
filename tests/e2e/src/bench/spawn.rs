//! Twenty concurrent sandboxes of one template: time and memory.

use std::{fs, time::Instant};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::{Value, json};

use super::{
    host::processes_of,
    median, probe,
    resume::{create, post},
    rounded,
};
use crate::{Sandbox, Service};

const SPAWNS: usize = 20;

/// Measures the spawns. Each sandbox runs `true`.
///
/// # Errors
/// A sandbox does not start.
pub async fn spawn(service: &Service) -> Result<Value> {
    let origin = create(service, json!({ "timeout_sec": 0 })).await?;
    origin.exec("python3", &["-c", "print(1)"]).await?;
    let body = json!({ "sandbox_id": origin.id(), "name": "bench-spawn" });
    service
        .json(reqwest::Method::POST, "/v1/snapshots", &body)
        .await?;
    post(service, &origin.path("/pause")).await?;
    let request = json!({ "template": "bench-spawn", "timeout_sec": 0 });
    // The first sandbox loads the pages that all of them need.
    let first = create(service, request.clone()).await?;
    first.exec("true", &[]).await?;
    let of_first = probe::pager(service, &first).await?;

    let begun = Instant::now();
    let others: Vec<Sandbox<'_>> = stream::iter(1..SPAWNS)
        .map(|_| async {
            let sandbox = create(service, request.clone()).await?;
            sandbox.exec("true", &[]).await?;
            anyhow::Ok(sandbox)
        })
        .buffer_unordered(SPAWNS)
        .try_collect()
        .await?;
    let wall = begun.elapsed().as_secs_f64();
    let (mut own, mut faults) = (Vec::new(), Vec::new());
    for sandbox in &others {
        own.push(guest_anonymous_mb(sandbox)?);
        let pages = probe::pager(service, sandbox).await?;
        faults.push(u32::try_from(pages.faults + pages.zero_faults).map_or(f64::NAN, f64::from));
    }
    for sandbox in others.into_iter().chain([first]) {
        sandbox.destroy().await?;
    }
    origin.destroy().await?;
    Ok(json!({
        "spawns": SPAWNS - 1,
        "wall_seconds_to_the_last_answer": rounded(wall),
        "seconds_each": rounded(wall / 19.0),
        "guest_pages_of_its_own_mb": rounded(median(own)),
        "limit_guest_pages_of_its_own_mb": 4,
        "faults_of_the_first": of_first.faults + of_first.zero_faults,
        "faults_of_each_later_one": rounded(median(faults)),
    }))
}

/// Returns the anonymous pages in the guest memory mapping of a sandbox's VMM: memory that it does
/// not share with other VMs. The mapping is identified by the name of the memory file; its
/// `Anonymous` field is in kB (`proc_pid_smaps(5)`).
fn guest_anonymous_mb(sandbox: &Sandbox<'_>) -> Result<f64> {
    let vmm = processes_of(sandbox.id())
        .into_iter()
        .find(|(_, line)| line.contains("qemu-system"));
    let (pid, _) = vmm.context("no VMM of the sandbox")?;
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut inside = false;
    let mut kb = 0.0;
    for line in smaps.lines() {
        if line.contains('-') && line.split(' ').next().is_some_and(|w| w.contains('-')) {
            inside = line.contains("snapshot-memory");
        } else if let Some(number) = line.strip_prefix("Anonymous:")
            && inside
        {
            kb += number
                .trim()
                .trim_end_matches(" kB")
                .trim()
                .parse::<f64>()?;
        }
    }
    Ok(kb / 1024.0)
}
