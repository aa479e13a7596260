//! Cost of memory that a guest used and freed: resident memory of the VMM, and size and duration of
//! the next pause.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Map, Value, json};

use super::{
    host::megabytes,
    resume::{as_f64, create, millis, newest, post},
    rounded,
};
use crate::{
    Sandbox, Service,
    host::{resident_kb, vmm_of},
};

const MEMORY_MB: u32 = 1536;

/// Resident memory above the idle level at which the memory counts as returned, in MB.
const MOST_ABOVE_IDLE_MB: f64 = 60.0;

/// Maximum time until the memory has returned.
const LIMIT: Duration = Duration::from_secs(30);

const USE_MEMORY: &str = r#"
memory = bytearray(900 << 20)
for at in range(0, len(memory), 4096):
    memory[at] = 1
"#;

/// Measures a booted VM, and then the same VM after it was restored from its own snapshot.
///
/// # Errors
/// The sandbox does not start, or fails.
pub(super) async fn freed(service: &Service) -> Result<Value> {
    let body = json!({ "timeout_sec": 0, "memory_mb": MEMORY_MB });
    let sandbox = create(service, body).await?;
    sandbox.until_status("running").await?;
    sandbox.exec("python3", &["-c", "print(1)"]).await?;
    let mut report = Map::new();
    for kind in ["booted", "restored"] {
        report.insert(kind.to_owned(), measure(service, &sandbox).await?);
        post(service, &sandbox.path("/resume")).await?;
    }
    sandbox.destroy().await?;
    report.insert("limit_seconds_to_idle".into(), json!(LIMIT.as_secs()));
    report.insert("limit_mb_above_idle".into(), json!(MOST_ABOVE_IDLE_MB));
    Ok(Value::Object(report))
}

/// Uses and frees memory, waits until it has returned, and pauses the sandbox.
async fn measure(service: &Service, sandbox: &Sandbox<'_>) -> Result<Value> {
    let idle = resident_mb(sandbox)?;
    let used = sandbox.exec("python3", &["-c", USE_MEMORY]).await?;
    ensure!(used.code == 0, "{used:?}");
    let begun = Instant::now();
    let after_use = resident_mb(sandbox)?;
    let mut seconds = None;
    while begun.elapsed() < LIMIT {
        if seconds.is_none() && resident_mb(sandbox)? < idle + MOST_ABOVE_IDLE_MB {
            seconds = Some(rounded(begun.elapsed().as_secs_f64()));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let left = resident_mb(sandbox)?;
    let begun = Instant::now();
    post(service, &sandbox.path("/pause")).await?;
    let pause_ms = millis(begun);
    let file = newest(&service.dir().join("snapshots/memory"))?;
    Ok(json!({
        "vmm_resident_idle_mb": rounded(idle),
        "vmm_resident_after_use_mb": rounded(after_use),
        "vmm_resident_30_s_later_mb": rounded(left),
        "seconds_to_idle": seconds,
        "next_pause_bytes": as_f64(fs::metadata(file)?.len()),
        "next_pause_ms": rounded(pause_ms),
    }))
}

fn resident_mb(sandbox: &Sandbox<'_>) -> Result<f64> {
    let pid = vmm_of(sandbox.id()).context("no VMM")?;
    Ok(megabytes(resident_kb(u32::try_from(pid)?)?))
}
