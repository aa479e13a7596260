//! CPU model of guests: the default, the setting, and the model of a saved state.

use std::{path::PathBuf, process::Command};

use anyhow::{Result, ensure};
use reqwest::Method;
use serde_json::json;
use wrenn_e2e::{Sandbox, Service};

/// CPU model of release 0.1.0 for emulated guests. It has no AVX.
const OLD: &str = "Nehalem-v1,+arat";

/// Compiles the program that uses AVX2.
fn avx2_program(dir: &tempfile::TempDir) -> Result<PathBuf> {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/guest/avx2.c");
    let program = dir.path().join("avx2");
    let status = Command::new("cc")
        .args(["-O1", "-static", "-march=x86-64-v3", "-o"])
        .arg(&program)
        .arg(source)
        .status()?;
    ensure!(status.success(), "cc: {status}");
    Ok(program)
}

/// Returns the exit code of the program that uses AVX2: 0, or -1 if a signal ended it.
async fn use_avx2(sandbox: &Sandbox<'_>) -> Result<i64> {
    let dir = tempfile::tempdir()?;
    let program = tokio::fs::read(avx2_program(&dir)?).await?;
    sandbox.write("/tmp/avx2", program).await?;
    sandbox.script("chmod +x /tmp/avx2").await?;
    Ok(sandbox.exec("/tmp/avx2", &[]).await?.code)
}

async fn cpu_of(sandbox: &Sandbox<'_>) -> Result<String> {
    let record = sandbox.record().await?;
    Ok(record["cpu"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn start_of_the_service_warns_of_software_emulation() -> Result<()> {
    let service = Service::start().await?;
    let (_, host) = service.get("/v1/host").await?;
    let warns = service.log().contains("is not a security boundary");
    assert_eq!(warns, host["accel"] == "tcg", "{}", service.log());
    Ok(())
}

#[tokio::test]
async fn programs_that_require_avx2_run_in_booted_and_restored_guests() -> Result<()> {
    let service = Service::start().await?;
    let (_, host) = service.get("/v1/host").await?;
    for memory_mb in [256, 512] {
        let sandbox = service
            .create_with(json!({ "memory_mb": memory_mb }))
            .await?;
        assert_eq!(use_avx2(&sandbox).await?, 0, "{memory_mb} MiB");
        assert_eq!(json!(cpu_of(&sandbox).await?), host["cpu"]);
        sandbox.destroy().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_saved_state_keeps_its_cpu_model_and_a_boot_gets_the_current_one() -> Result<()> {
    let mut service = Service::start_with("WRENN_CPU", OLD).await?;
    let sandbox = service.create_with(json!({ "memory_mb": 512 })).await?;
    assert_eq!(cpu_of(&sandbox).await?, OLD);
    assert_eq!(use_avx2(&sandbox).await?, -1);
    sandbox.pause().await?;
    let id = sandbox.id().to_owned();
    service.stop().await?;
    service.set("WRENN_CPU", None);
    service.start_again().await?;

    let sandbox = Sandbox::new(&service, id);
    assert_eq!(cpu_of(&sandbox).await?, OLD);
    sandbox.resume().await?;
    assert_eq!(cpu_of(&sandbox).await?, OLD);
    assert_eq!(use_avx2(&sandbox).await?, -1);
    let body = json!({ "sandbox_id": sandbox.id(), "name": "old" });
    let (status, reply) = service.json(Method::POST, "/v1/snapshots", &body).await?;
    ensure!(status.is_success(), "{status}: {reply}");
    let copy = service.create_with(json!({ "template": "old" })).await?;
    assert_eq!(cpu_of(&copy).await?, OLD);
    copy.destroy().await?;

    sandbox.pause().await?;
    sandbox.boot().await?;
    assert_ne!(cpu_of(&sandbox).await?, OLD);
    assert_eq!(sandbox.exec("/tmp/avx2", &[]).await?.code, 0);
    sandbox.destroy().await
}

#[tokio::test]
async fn a_cpu_model_that_the_vmm_does_not_have_is_rejected_at_the_start() -> Result<()> {
    let Err(error) = Service::start_with("WRENN_CPU", "no-such-cpu").await else {
        panic!("started");
    };
    let error = format!("{error:#}");
    assert!(
        error.contains("no-such-cpu") && error.contains("WRENN_CPU"),
        "{error}"
    );
    Ok(())
}
