//! Failures of VMs, supervisors, the service and the disk, and their isolation from other
//! sandboxes.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::Method;
use serde_json::{Value, json};
use wrenn_e2e::{
    Sandbox, Service, SmallDisk,
    wait::{GENEROUS, until},
};

/// Returns the free bytes of a file system.
fn free_bytes(path: &std::path::Path) -> Result<u64> {
    let stat = nix::sys::statvfs::statvfs(path)?;
    Ok(stat.blocks_available() * stat.fragment_size())
}

/// Maximum time until a loss is reported.
const FIVE_SECONDS: Duration = Duration::from_secs(5);

/// Returns the process ids of a sandbox's supervisor and VMM.
fn processes(sandbox: &Sandbox<'_>) -> Result<(Pid, Pid)> {
    let find = |wanted: &dyn Fn(&str) -> bool| {
        fs::read_dir("/proc")?
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .find(|pid| {
                fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| {
                    let line = String::from_utf8_lossy(&line).replace('\0', " ");
                    line.contains(sandbox.id()) && wanted(&line)
                })
            })
            .map(Pid::from_raw)
            .context("no process of the sandbox")
    };
    let supervisor = find(&|line| line.contains(" supervise "))?;
    let vmm = find(&|line| line.starts_with("/usr/bin/qemu-system"))?;
    Ok((supervisor, vmm))
}

async fn until_error(sandbox: &Sandbox<'_>) -> Result<Value> {
    until("the loss is reported", FIVE_SECONDS, async || {
        let record = sandbox.record().await?;
        Ok((record["status"] == "error").then_some(record))
    })
    .await
}

#[tokio::test]
async fn killed_vmm_is_an_error_with_a_reason_and_affects_no_other() -> Result<()> {
    let service = Service::start().await?;
    let lost = service.create().await?;
    let other = service.create().await?;
    let (supervisor, vmm) = processes(&lost)?;
    kill(vmm, Signal::SIGKILL)?;
    let record = until_error(&lost).await?;
    let reason = record["error"].as_str().unwrap_or_default();
    assert!(reason.contains("killed"), "{record}");
    assert_eq!(other.exec("true", &[]).await?.code, 0);
    until("the supervisor has exited", GENEROUS, async || {
        Ok(kill(supervisor, None).is_err().then_some(()))
    })
    .await?;
    lost.destroy().await?;
    other.destroy().await
}

/// Returns the log of a sandbox's supervisor, by the command line.
fn log_lines(service: &Service, id: &str) -> Result<Vec<Value>> {
    let output = service.command("sandbox").args(["logs", id]).output()?;
    ensure!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout)?;
    let parse = |line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}"));
    text.lines().map(parse).collect()
}

#[tokio::test]
async fn supervisor_log_names_its_sandbox_and_outlives_a_failure() -> Result<()> {
    let service = Service::start().await?;
    let lost = service.create().await?;
    let (_, vmm) = processes(&lost)?;
    let before = log_lines(&service, lost.id())?;
    let has = |lines: &[Value], message: &str| {
        let mut lines = lines.iter();
        lines.any(|line| line["fields"]["message"] == message)
    };
    assert!(has(&before, "VM started"), "{before:?}");
    kill(vmm, Signal::SIGKILL)?;
    until_error(&lost).await?;
    until("the directory is removed", GENEROUS, async || {
        let dir = service.dir().join("sandboxes").join(lost.id());
        Ok((!dir.exists()).then_some(()))
    })
    .await?;
    let after = log_lines(&service, lost.id())?;
    assert!(after.len() > before.len(), "{after:?}");
    assert!(has(&after, "VM ended"), "{after:?}");
    for line in &after {
        assert_eq!(line["sandbox_id"], lost.id(), "{line}");
    }
    let mut console = service.command("sandbox");
    let console = console.args(["logs", "--console", "--tail", "1", lost.id()]);
    let console = console.output()?;
    assert!(console.status.success(), "{console:?}");
    Ok(())
}

#[tokio::test]
async fn killed_supervisor_ends_its_vmm_and_is_an_error() -> Result<()> {
    let service = Service::start().await?;
    let lost = service.create().await?;
    let other = service.create().await?;
    let (supervisor, vmm) = processes(&lost)?;
    kill(supervisor, Signal::SIGKILL)?;
    let record = until_error(&lost).await?;
    let reason = record["error"].as_str().unwrap_or_default();
    assert!(reason.contains("supervisor"), "{record}");
    until("the VMM is gone", GENEROUS, async || {
        Ok(kill(vmm, None).is_err().then_some(()))
    })
    .await?;
    assert_eq!(other.exec("true", &[]).await?.code, 0);
    other.destroy().await
}

#[tokio::test]
async fn sandboxes_survive_a_killed_service() -> Result<()> {
    let mut service = Service::start().await?;
    let (id, boot_id) = {
        let sandbox = service.create().await?;
        sandbox.write("/home/user/kept", "kept").await?;
        let boot_id = sandbox
            .shell("cat /proc/sys/kernel/random/boot_id")
            .await?
            .stdout;
        (sandbox.id().to_owned(), boot_id)
    };
    service.kill()?;
    service.start_again().await?;
    let sandbox = Sandbox::new(&service, id);
    sandbox.until_status("running").await?;
    assert_eq!(
        sandbox
            .shell("cat /proc/sys/kernel/random/boot_id")
            .await?
            .stdout,
        boot_id
    );
    assert_eq!(sandbox.read("/home/user/kept").await?, b"kept");
    let (_, list) = service.get("/v1/sandboxes?status=all").await?;
    assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
    sandbox.destroy().await
}

#[tokio::test]
async fn sandboxes_survive_an_orderly_stop() -> Result<()> {
    let mut service = Service::start().await?;
    let id = service.create().await?.id().to_owned();
    assert_eq!(service.stop().await?, 0, "{}", service.log());
    service.start_again().await?;
    let sandbox = Sandbox::new(&service, id);
    assert_eq!(sandbox.exec("true", &[]).await?.code, 0);
    sandbox.destroy().await
}

#[tokio::test]
async fn a_sandbox_lost_while_the_service_was_down_is_an_error_afterwards() -> Result<()> {
    let mut service = Service::start().await?;
    let (id, vmm) = {
        let sandbox = service.create().await?;
        let (_, vmm) = processes(&sandbox)?;
        (sandbox.id().to_owned(), vmm)
    };
    service.kill()?;
    kill(vmm, Signal::SIGKILL)?;
    until("the VMM is gone", GENEROUS, async || {
        Ok(kill(vmm, None).is_err().then_some(()))
    })
    .await?;
    service.start_again().await?;
    let record = until_error(&Sandbox::new(&service, id)).await?;
    assert!(
        record["error"].as_str().is_some_and(|e| !e.is_empty()),
        "{record}"
    );
    Ok(())
}

#[tokio::test]
async fn racing_calls_on_one_sandbox_are_all_answered() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    let execs = (0..10).map(|_| async {
        service
            .json(
                Method::POST,
                &sandbox.path("/exec"),
                &json!({ "cmd": "true" }),
            )
            .await
            .map(|(status, body)| {
                let known = [200, 404, 409, 502, 503].contains(&status.as_u16());
                assert!(known, "{status} {body}");
            })
    });
    let destroys = (0..5).map(|_| sandbox.destroy());
    let (execs, destroys) = futures::join!(
        futures::future::join_all(execs),
        futures::future::join_all(destroys)
    );
    execs
        .into_iter()
        .chain(destroys)
        .collect::<Result<Vec<_>>>()?;
    assert_eq!(sandbox.record().await?["status"], "stopped");
    Ok(())
}

#[tokio::test]
async fn full_disk_rejects_creates_and_keeps_sandboxes_usable() -> Result<()> {
    let disk = SmallDisk::new(700)?;
    let service = Service::start_in(disk.path()).await?;
    let old = service.create().await?;
    let filler = disk.path().join("filler");
    fs::write(&filler, vec![1; 600 << 20])?;
    let (status, body) = service
        .json(Method::POST, "/v1/sandboxes", &json!({ "memory_mb": 256 }))
        .await?;
    let record = if status.is_success() {
        // The host detected the full disk after the response, so the record contains the error.
        let id = body["id"].as_str().unwrap_or_default().to_owned();
        let sandbox = Sandbox::new(&service, id);
        until("the create fails", GENEROUS, async || {
            let record = sandbox.record().await?;
            Ok((record["status"] == "error").then_some(record))
        })
        .await?
    } else {
        body
    };
    assert!(record.to_string().contains("disk"), "{status} {record}");
    assert_eq!(
        old.exec("true", &[]).await?.code,
        0,
        "existing sandboxes must stay usable"
    );
    // A write while the disk is full is not lost, but waits for free space. The write is small,
    // because the disk is in memory, which counts for the VMM.
    let left = usize::try_from(free_bytes(disk.path())?)?;
    fs::write(
        disk.path().join("rest"),
        vec![1; left.saturating_sub(16 << 20)],
    )?;
    let writes = "dd if=/dev/urandom of=/root/written bs=1M count=48 conv=fsync 2>&1";
    let writing = old.shell(writes);
    let making_room = async {
        // The guest is held when less than 2 percent of the disk are free.
        until("the disk is full", GENEROUS, async || {
            Ok((free_bytes(disk.path())? < 14 << 20).then_some(()))
        })
        .await?;
        fs::remove_file(&filler)?;
        anyhow::Ok(())
    };
    let (written, made) = tokio::join!(writing, making_room);
    made?;
    let written = written?;
    assert_eq!(written.code, 0, "{written:?}");
    let new = service.create().await?;
    assert_eq!(new.exec("true", &[]).await?.code, 0);
    new.destroy().await?;
    old.destroy().await
}

#[tokio::test]
async fn disk_requests_of_a_guest_are_limited_by_the_setting() -> Result<()> {
    // 40 MiB at 10 MiB per second, of which a tenth of a second is free.
    let write = "dd if=/dev/zero of=/home/user/x bs=1M count=40 oflag=direct conv=fsync 2>&1";
    let read = "dd if=/home/user/x of=/dev/null bs=1M iflag=direct 2>&1";
    let service = Service::start_with("WRENN_DISK_MB_PER_SEC", "10").await?;
    // A restored VM, and a booted one.
    for request in [json!({}), json!({ "memory_mb": 384 })] {
        let sandbox = service.create_with(request).await?;
        for command in [write, read] {
            let began = Instant::now();
            let output = sandbox.shell(command).await?;
            assert_eq!(output.code, 0, "{output:?}");
            let took = began.elapsed();
            assert!(took >= Duration::from_millis(3500), "{command}: {took:?}");
        }
        sandbox.destroy().await?;
    }
    Ok(())
}
