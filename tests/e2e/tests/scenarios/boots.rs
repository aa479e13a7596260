//! Boots from disk: many at once, and boots that make no progress.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use wrenn_e2e::{
    Service,
    host::vmm_of,
    rounds,
    wait::{GENEROUS, until},
};

/// Number of concurrent boots.
const AT_ONCE: usize = 8;

async fn boot_counts(service: &Service) -> Result<Value> {
    let (status, host) = service.get("/v1/host").await?;
    ensure!(status.is_success(), "{status}: {host}");
    Ok(host["boots"].clone())
}

/// Returns a create request with a memory size that no template has, so that the sandbox boots.
fn cold() -> Value {
    json!({ "memory_mb": 256 })
}

/// Boots a sandbox and checks that its timer works, and that the timer's speed is correct within a
/// factor of two.
async fn boot_and_use(service: &Service) -> Result<()> {
    let sandbox = service.create_with(cold()).await?;
    let began = Instant::now();
    let slept = sandbox.exec("sleep", &["0.2"]).await?;
    ensure!(slept.code == 0, "{slept:?}");
    ensure!(began.elapsed() >= Duration::from_millis(200));
    sandbox.destroy().await
}

#[tokio::test]
async fn concurrent_boots_all_succeed() -> Result<()> {
    let service = Service::start().await?;
    let count = rounds(500);
    stream::iter(0..count)
        .map(|_| boot_and_use(&service))
        .buffer_unordered(AT_ONCE)
        .try_collect::<()>()
        .await
        .with_context(|| service.log())?;
    let boots = boot_counts(&service).await?;
    eprintln!("boots: {boots}");
    assert_eq!(boots["started"], count, "{boots}");
    assert_eq!(boots["stalled"], 0, "{boots}");
    // Repeated attempts cost a second or two each. On a busy machine some are needed.
    let retried = boots["retried"].as_u64().context("no count")?;
    assert!(retried <= count as u64 / 4, "{boots}\n{}", service.log());
    Ok(())
}

/// The VMM is stopped in the middle of the boot, so the guest makes no progress and uses no
/// processor time.
#[tokio::test]
async fn stalled_boot_is_repeated() -> Result<()> {
    let service = Service::start().await?;
    let began = Instant::now();
    // The create returns once the guest is up, so the VMM is stopped concurrently.
    let stop = until("the kernel is up", GENEROUS, async || {
        Ok(booting_vmm(service.dir()))
    });
    let stop = async {
        let first = Pid::from_raw(stop.await?);
        Ok(kill(first, Signal::SIGSTOP).map(|()| first)?)
    };
    let (sandbox, first) = tokio::try_join!(service.create_unready(cold()), stop)?;
    let record = sandbox.until_status("running").await?;
    assert!(record["error"].is_null(), "{record}");
    assert!(began.elapsed() < Duration::from_secs(60));
    assert_ne!(vmm_of(sandbox.id()), Some(first.as_raw()));
    let boots = boot_counts(&service).await?;
    assert_eq!(
        (&boots["started"], &boots["retried"], &boots["stalled"]),
        (&json!(1), &json!(1), &json!(0)),
        "{boots}"
    );
    let log = service.log();
    assert!(
        log.contains("boot made no progress") && log.contains("wrenn: kernel up"),
        "{log}"
    );
    assert_eq!(sandbox.exec("true", &[]).await?.code, 0);
    Ok(())
}

/// Returns the VMM of the service's only sandbox, once its kernel is up.
fn booting_vmm(dir: &Path) -> Option<i32> {
    let mut sandboxes = std::fs::read_dir(dir.join("sandboxes")).ok()?;
    let folder = sandboxes.next()?.ok()?;
    let console = std::fs::read_to_string(folder.path().join("console.log")).ok()?;
    if !console.contains("wrenn: kernel up") {
        return None;
    }
    vmm_of(folder.file_name().to_str()?)
}

#[tokio::test]
async fn templates_of_a_copied_image_directory_are_restored_and_others_are_named() -> Result<()> {
    let images = PathBuf::from(std::env::var("WRENN_IMAGES_DIR").context("WRENN_IMAGES_DIR")?);
    // Next to the original, so that hard links suffice.
    let parent = images.parent().context("a parent")?;
    let copy = tempfile::tempdir_in(parent)?;
    let copied = copy.path().join("images");
    let status = Command::new("cp")
        .arg("-al")
        .args([&images, &copied])
        .status()?;
    ensure!(status.success(), "{status}");
    let path = copied.to_str().context("text")?;
    let mut service = Service::start_with("WRENN_IMAGES_DIR", path).await?;
    let (_, host) = service.get("/v1/host").await?;
    assert_eq!(host["cold_templates"], json!([]), "{}", service.log());
    let restored = service.create_with(json!({ "memory_mb": 512 })).await?;
    assert_eq!(boot_counts(&service).await?["started"], 0);
    restored.destroy().await?;

    // Without its name, the snapshot of `base` is not found.
    service.stop().await?;
    for entry in std::fs::read_dir(copied.join("snapshots/names"))? {
        let path = entry?.path();
        if path.display().to_string().contains("warm-base-") {
            std::fs::remove_file(path)?;
        }
    }
    service.start_again().await?;
    let (_, host) = service.get("/v1/host").await?;
    assert_eq!(host["cold_templates"][0]["name"], "base", "{host}");
    let log = service.log();
    assert!(log.contains("no usable template snapshot"), "{log}");
    let report = service.command("doctor").arg("--json").output()?;
    let report: Vec<Value> = serde_json::from_slice(&report.stdout)?;
    let finding = report.iter().find(|f| f["name"] == "template snapshots");
    let finding = finding.context("no finding")?;
    assert_eq!(finding["level"], "warn", "{finding}");
    assert_eq!(finding["fix"], "wrenn image build base", "{finding}");
    Ok(())
}

/// A failed calibration leaves a kernel without a clock event device.
#[test]
fn guest_without_a_timer_fails_its_boot_and_one_with_a_timer_continues() -> Result<()> {
    let dead = console_of("nolapic_timer", "wrenn: boot failed: ")?;
    assert!(dead.contains("CPU 0 has no clock event device"), "{dead}");
    // Without a disk, the boot ends after the check.
    let alive = console_of("wrenn.timer_tolerance=90", "wrenn: failed to mount root")?;
    assert!(!alive.contains("boot failed"), "{alive}");
    Ok(())
}

/// Boots the template's kernel and initramfs in a bare QEMU. Returns the console output once it
/// contains `mark`.
fn console_of(kernel_arg: &str, mark: &str) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let console = dir.path().join("console");
    let kernel = kernel_dir()?;
    let args = format!(
        "console=ttyS0 quiet panic=-1 reboot=t no_timer_check tsc=reliable nokaslr mitigations=off \
         tsc_early_khz=2000000 {kernel_arg}"
    );
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-M", "microvm,acpi=on,pit=on,pic=on,rtc=on,isa-serial=on"])
        .args(["-accel", "tcg", "-cpu", "Nehalem-v1,+arat", "-m", "256"])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .arg("-kernel")
        .arg(kernel.join("vmlinux"))
        .arg("-initrd")
        .arg(kernel.join("initrd.img"))
        .args(["-append", &args])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .stdin(Stdio::null())
        .spawn()
        .context("failed to start QEMU")?;
    let began = Instant::now();
    let read = || std::fs::read_to_string(&console).unwrap_or_default();
    while !read().contains(mark) && began.elapsed() < GENEROUS {
        std::thread::sleep(Duration::from_millis(50));
    }
    let _ = qemu.kill();
    let _ = qemu.wait();
    let text = read();
    ensure!(text.contains(mark), "{mark:?} did not come: {text}");
    Ok(text)
}

fn kernel_dir() -> Result<PathBuf> {
    let images = std::env::var("WRENN_IMAGES_DIR").context("WRENN_IMAGES_DIR")?;
    let images = Path::new(&images);
    let record = std::fs::read(images.join("templates/minimal.json"))?;
    let record: Value = serde_json::from_slice(&record)?;
    let key = record["kernel_key"].as_str().context("no kernel")?;
    Ok(images.join("kernels").join(key))
}
