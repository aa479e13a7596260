//! Death of the agent, of the supervisor (whose threads serve the guest's memory) and of the VMM at
//! every step of a pause and of a resume. In all cases, the sandbox runs, is paused, or is lost
//! with a reason. The last complete snapshot can be restored, and nothing is left on the host.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on should stop where it is"
)]

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use wrenn_e2e::{
    Sandbox, Service, SmallDisk,
    host::Traces,
    wait::{GENEROUS, until},
};

const AGENT_PAUSE: [&str; 6] = [
    "self@agent.pause.drained",
    "self@agent.snapshot.prepared",
    "self@agent.snapshot.captured",
    "self@agent.snapshot.published",
    "self@agent.pause.noted",
    "self@agent.pause.freed",
];
/// Failpoints of a snapshot of a VM that keeps running. Copies are created later.
const AGENT_FORK: [&str; 3] = [
    "self@agent.snapshot.prepared",
    "self@agent.snapshot.captured",
    "self@agent.snapshot.published",
];
const AGENT_RESUME: [&str; 5] = [
    "self@agent.start.parts",
    "self@agent.start.spec",
    "self@agent.start.supervised",
    "self@agent.start.recovered",
    "self@agent.resume.noted",
];
const MACHINE_PAUSE: [&str; 6] = [
    "self@supervisor.snapshot.paused",
    "self@supervisor.snapshot.saved",
    "self@supervisor.snapshot.written",
    "vmm@supervisor.snapshot.paused",
    "vmm@supervisor.snapshot.saved",
    "vmm@supervisor.snapshot.written",
];
const MACHINE_RESUME: [&str; 7] = [
    "self@supervisor.restore.prepared",
    "self@supervisor.restore.attached",
    "self@supervisor.restore.loaded",
    "self@supervisor.restore.resumed",
    "vmm@supervisor.restore.attached",
    "vmm@supervisor.restore.loaded",
    "vmm@supervisor.restore.resumed",
];

/// Stores `generation` in the memory of the sandbox.
async fn remember(sandbox: &Sandbox<'_>, generation: u32) -> Result<()> {
    let done = sandbox
        .shell(&format!("echo {generation} >/dev/shm/generation"))
        .await?;
    ensure!(done.code == 0, "{done:?}");
    Ok(())
}

async fn remembered(sandbox: &Sandbox<'_>) -> Result<String> {
    Ok(sandbox
        .shell("cat /dev/shm/generation")
        .await?
        .stdout
        .trim()
        .to_owned())
}

pub(crate) async fn create(service: &Service) -> Result<String> {
    let body = json!({ "timeout_sec": 0 });
    let (status, made) = service.json(Method::POST, "/v1/sandboxes", &body).await?;
    ensure!(status.is_success(), "{made}");
    Ok(made["id"].as_str().context("no id")?.to_owned())
}

/// Sends a request and ignores the response, because the responding process may die.
async fn ask(service: &Service, id: &str, verb: &str) {
    let path = format!("/v1/sandboxes/{id}/{verb}");
    let _ = service.json(Method::POST, &path, &json!({})).await;
}

async fn must(service: &Service, id: &str, verb: &str) -> Result<Value> {
    let path = format!("/v1/sandboxes/{id}/{verb}");
    let (status, reply) = service.json(Method::POST, &path, &json!({})).await?;
    ensure!(status.is_success(), "{verb}: {status}: {reply}");
    Ok(reply)
}

/// Waits until the sandbox is in a stable state, and returns the state.
pub(crate) async fn settled(service: &Service, id: &str) -> Result<String> {
    let sandbox = Sandbox::new(service, id.to_owned());
    until("the sandbox settles", GENEROUS, async || {
        let record = sandbox.record().await?;
        let status = record["status"].as_str().unwrap_or_default().to_owned();
        let lasts = ["running", "paused", "error"].contains(&status.as_str());
        if status == "error" {
            let reason = record["error"].as_str().unwrap_or_default();
            ensure!(!reason.is_empty(), "an error without a reason: {record}");
        }
        Ok(lasts.then_some(status))
    })
    .await
}

/// Checks that the sandbox is running or can be resumed, and that it holds one of `generations`.
/// Then pauses and resumes it once more, and destroys it.
async fn usable(service: &Service, id: &str, fault: &str, generations: &[&str]) -> Result<()> {
    let sandbox = Sandbox::new(service, id.to_owned());
    let status = settled(service, id).await?;
    if status != "running" {
        must(service, id, "resume")
            .await
            .with_context(|| format!("{fault}: status was {status}"))?;
    }
    let generation = remembered(&sandbox).await?;
    assert!(
        generations.contains(&generation.as_str()),
        "{fault}: holds {generation:?}, status was {status}"
    );
    must(service, id, "pause")
        .await
        .with_context(|| fault.to_owned())?;
    must(service, id, "resume")
        .await
        .with_context(|| fault.to_owned())?;
    assert_eq!(remembered(&sandbox).await?, generation, "{fault}");
    sandbox.destroy().await
}

pub(crate) async fn nothing_left(service: &Service, before: &Traces, fault: &str) -> Result<()> {
    let settled = until(
        "the host is as before",
        Duration::from_secs(30),
        async || Ok((Traces::of(service.dir())? == *before).then_some(())),
    );
    if settled.await.is_err() {
        assert_eq!(
            &Traces::of(service.dir())?,
            before,
            "{fault}: left on the host"
        );
    }
    Ok(())
}

/// Starts a service that has created and destroyed one sandbox, and records the resources on the
/// host.
pub(crate) async fn warmed() -> Result<(Service, Traces)> {
    warm(Service::start().await?).await
}

/// Same as [`warmed`], for a service that was started.
pub(crate) async fn warm(service: Service) -> Result<(Service, Traces)> {
    Sandbox::new(&service, create(&service).await?)
        .destroy()
        .await?;
    let before = Traces::of(service.dir())?;
    Ok((service, before))
}

/// Kills the agent at each of `points` while it handles request `verb`. The sandbox has completed
/// request `first` before.
pub(crate) async fn the_agent_dies(points: &[&str], first: Option<&str>, verb: &str) -> Result<()> {
    the_agent_of_dies(Service::start().await?, points, first, verb).await
}

/// Same as [`the_agent_dies`], for a service that was started.
pub(crate) async fn the_agent_of_dies(
    service: Service,
    points: &[&str],
    first: Option<&str>,
    verb: &str,
) -> Result<()> {
    let (mut service, before) = warm(service).await?;
    for fault in points {
        let id = create(&service).await?;
        remember(&Sandbox::new(&service, id.clone()), 1).await?;
        if let Some(first) = first {
            must(&service, &id, first).await?;
        }
        service.restart_with_fault(Some(fault)).await?;
        ask(&service, &id, verb).await;
        assert!(
            service.has_died().await?,
            "{fault}: the failpoint was not reached"
        );
        service.restart_with_fault(None).await?;
        usable(&service, &id, fault, &["1"]).await?;
        nothing_left(&service, &before, fault).await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_agent_dies_at_each_step_of_a_pause() -> Result<()> {
    the_agent_dies(&AGENT_PAUSE, None, "pause").await
}

#[tokio::test]
async fn the_agent_dies_at_each_step_of_a_resume() -> Result<()> {
    the_agent_dies(&AGENT_RESUME, Some("pause"), "resume").await
}

#[tokio::test]
async fn the_agent_dies_at_each_step_of_a_fork() -> Result<()> {
    the_agent_dies(&AGENT_FORK, None, "fork").await
}

#[tokio::test]
async fn the_vm_dies_at_each_step_of_a_pause() -> Result<()> {
    the_machine_dies(Service::start().await?, &MACHINE_PAUSE, "pause").await
}

#[tokio::test]
async fn the_vm_dies_at_each_step_of_a_fork() -> Result<()> {
    the_machine_dies(Service::start().await?, &MACHINE_PAUSE, "fork").await
}

/// Kills the supervisor or the VMM at each step of a snapshot, while a sandbox with an earlier
/// snapshot handles request `verb`.
pub(crate) async fn the_machine_dies(service: Service, points: &[&str], verb: &str) -> Result<()> {
    let (mut service, before) = warm(service).await?;
    for fault in points {
        let id = create(&service).await?;
        remember(&Sandbox::new(&service, id.clone()), 1).await?;
        must(&service, &id, "pause").await?;
        // The supervisor started by this resume has the failpoint and reaches it in the second
        // pause.
        service.restart_with_fault(Some(fault)).await?;
        must(&service, &id, "resume").await?;
        remember(&Sandbox::new(&service, id.clone()), 2).await?;
        let other = create(&service).await?;
        ask(&service, &id, verb).await;
        let record = until("the sandbox is paused", GENEROUS, async || {
            let record = Sandbox::new(&service, id.clone()).record().await?;
            Ok((record["status"] == "paused").then_some(record))
        })
        .await?;
        // A killed VMM may be read to its last byte before it is gone, so the snapshot may be
        // complete. A VM that was to be resumed is lost.
        let killed_late = [
            "vmm@supervisor.snapshot.saved",
            "vmm@supervisor.snapshot.written",
        ];
        let may_be_complete = verb == "pause" && killed_late.contains(fault);
        let warned = record["warning"].as_str().unwrap_or_default();
        let is_lost = warned.contains("paused at its last snapshot");
        assert!(is_lost || may_be_complete, "{fault}: {record}");
        assert_eq!(
            Sandbox::new(&service, other.clone())
                .exec("true", &[])
                .await?
                .code,
            0
        );
        Sandbox::new(&service, other).destroy().await?;
        service.restart_with_fault(None).await?;
        let generation = if is_lost { "1" } else { "2" };
        usable(&service, &id, fault, &[generation]).await?;
        nothing_left(&service, &before, fault).await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_vm_dies_at_each_step_of_a_resume() -> Result<()> {
    the_machine_dies_in_a_resume(Service::start().await?, &MACHINE_RESUME).await
}

/// Kills the supervisor or the VMM at each step of a resume.
pub(crate) async fn the_machine_dies_in_a_resume(service: Service, points: &[&str]) -> Result<()> {
    let (mut service, before) = warm(service).await?;
    for fault in points {
        let id = create(&service).await?;
        remember(&Sandbox::new(&service, id.clone()), 1).await?;
        must(&service, &id, "pause").await?;
        service.restart_with_fault(Some(fault)).await?;
        ask(&service, &id, "resume").await;
        let status = settled(&service, &id).await?;
        assert_ne!(status, "running", "{fault}: the failpoint was not reached");
        service.restart_with_fault(None).await?;
        usable(&service, &id, fault, &["1"]).await?;
        nothing_left(&service, &before, fault).await?;
    }
    Ok(())
}

#[tokio::test]
async fn full_disk_during_a_pause_keeps_the_sandbox_running() -> Result<()> {
    let disk = SmallDisk::new(400)?;
    let service = Service::start_in(disk.path()).await?;
    let id = create(&service).await?;
    let sandbox = Sandbox::new(&service, id.clone());
    // More guest memory than fits on the disk, which cannot be compressed.
    let fill = "dd if=/dev/urandom of=/dev/shm/much bs=1M count=48 && sha256sum /dev/shm/much";
    let sum = sandbox.shell(fill).await?.stdout;
    let ballast = service.dir().join("ballast");
    let stat = nix::sys::statvfs::statvfs(disk.path())?;
    let free = usize::try_from(stat.blocks_available() * stat.fragment_size())?;
    fs::write(&ballast, vec![1; free - (24 << 20)])?;
    let path = sandbox.path("/pause");
    let (status, refused) = service.json(Method::POST, &path, &json!({})).await?;
    assert_eq!(status.as_u16(), 503, "{refused}");
    assert!(refused.to_string().contains("disk is full"), "{refused}");
    assert_eq!(sandbox.record().await?["status"], "running");
    assert_eq!(sandbox.shell("sha256sum /dev/shm/much").await?.stdout, sum);
    // A snapshot of a running VM moves the disk to a new file before it writes memory. The disk
    // stays in the new file after the failure.
    let snapshot = async |name: &str| {
        let body = json!({ "sandbox_id": id, "name": name });
        service.json(Method::POST, "/v1/snapshots", &body).await
    };
    let (status, refused) = snapshot("never").await?;
    assert_eq!(status.as_u16(), 503, "{refused}");
    assert_eq!(sandbox.record().await?["status"], "running");
    let write = "echo written >/home/user/after; sync; cat /home/user/after";
    assert_eq!(sandbox.shell(write).await?.stdout, "written\n");
    // The partial snapshot is removed, and the next one succeeds when there is space.
    sandbox.shell("rm /dev/shm/much").await?;
    fs::remove_file(ballast)?;
    remember(&sandbox, 1).await?;
    let (status, made) = snapshot("good").await?;
    ensure!(status.is_success(), "{made}");
    must(&service, &id, "pause").await?;
    must(&service, &id, "resume").await?;
    let body = json!({ "template": "good" });
    let (status, made) = service.json(Method::POST, "/v1/sandboxes", &body).await?;
    ensure!(status.is_success(), "{made}");
    let copy = Sandbox::new(&service, made["id"].as_str().context("no id")?.to_owned());
    for whole in [&sandbox, &copy] {
        let look = "cat /home/user/after; sudo dmesg | grep -c EXT4-fs.error";
        assert_eq!(whole.shell(look).await?.stdout, "written\n0\n");
    }
    copy.destroy().await?;
    usable(&service, &id, "full disk", &["1"]).await
}
