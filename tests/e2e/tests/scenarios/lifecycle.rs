//! Life of a sandbox from its creation to its end, from a user's view.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use reqwest::{Method, StatusCode};
use serde_json::json;
use wrenn_e2e::{
    Service,
    wait::{GENEROUS, until},
};

#[tokio::test]
async fn a_sandbox_is_created_used_and_destroyed() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;

    let record = sandbox.record().await?;
    assert_eq!(record["status"], "running");
    assert_eq!(record["template"], "minimal");
    assert_eq!(record["memory_mb"], 256);
    assert_eq!(record["guest_ip"], "169.254.0.21");
    for step in [
        "prepared_ms",
        "vmm_started_ms",
        "kernel_ms",
        "init_ms",
        "envd_ms",
    ] {
        assert!(
            record["boot"][step].as_u64().is_some_and(|ms| ms > 0),
            "{step}: {record}"
        );
    }

    // The kernel version may be the same as this machine's.
    const BOOT: &str = "/proc/sys/kernel/random/boot_id";
    let booted = sandbox.exec("cat", &[BOOT]).await?;
    assert_eq!(booted.code, 0, "{booted:?}");
    let here = std::fs::read_to_string(BOOT)?;
    assert_ne!(booted.stdout, here, "the sandbox must have its own kernel");

    let program = "n = sum(int(l) for l in open('/home/user/in')); open('/home/user/out', 'w').write(f'{n}\\n')";
    sandbox.write("/home/user/in", "1\n2\n39\n").await?;
    let run = sandbox.exec("python3", &["-c", program]).await?;
    assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{run:?}");
    assert_eq!(sandbox.read("/home/user/out").await?, b"42\n");

    sandbox.destroy().await?;
    assert_eq!(sandbox.record().await?["status"], "stopped");
    sandbox.destroy().await?;
    let (status, body) = service
        .json(
            Method::POST,
            &sandbox.path("/exec"),
            &json!({ "cmd": "true" }),
        )
        .await?;
    assert_eq!(status, StatusCode::CONFLICT, "{body}");
    assert_eq!(body["error"]["code"], "invalid_state");
    Ok(())
}

#[tokio::test]
async fn create_responds_within_five_seconds_and_calls_wait_for_the_boot() -> Result<()> {
    let service = Service::start().await?;
    let begun = Instant::now();
    let sandbox = service.create_unready(json!({})).await?;
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    // An exec is answered when the guest is up, whatever the status of the sandbox is.
    assert_eq!(sandbox.exec("true", &[]).await?.code, 0);
    sandbox.destroy().await
}

#[tokio::test]
async fn a_sandbox_that_is_still_starting_can_be_destroyed() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create_unready(json!({})).await?;
    sandbox.destroy().await?;
    assert_eq!(sandbox.record().await?["status"], "stopped");
    until("the sandbox's directory is gone", GENEROUS, async || {
        let left = std::fs::read_dir(service.dir().join("sandboxes"))?.count();
        Ok((left == 0).then_some(()))
    })
    .await
}

#[tokio::test]
async fn idle_sandbox_is_ended_and_a_ping_keeps_it() -> Result<()> {
    let service = Service::start().await?;
    let idle = service
        .create_with(json!({ "timeout_sec": 8, "on_timeout": "kill" }))
        .await?;
    // Created last, because it must be pinged from then on. It is pinged for longer than its idle
    // time, whenever the other sandbox ends.
    let kept = service.create_with(json!({ "timeout_sec": 8 })).await?;
    let begun = Instant::now();
    let ended = until("the idle sandbox ends", GENEROUS, async || {
        let (status, _) = service
            .json(Method::POST, &kept.path("/ping"), &json!({}))
            .await?;
        ensure!(status.is_success(), "{status}");
        let record = idle.record().await?;
        let is_over = record["status"] == "stopped" && begun.elapsed() > Duration::from_secs(10);
        Ok(is_over.then_some(record))
    })
    .await?;
    assert!(
        ended["error"].as_str().is_some_and(|e| e.contains("idle")),
        "{ended}"
    );
    assert_eq!(kept.record().await?["status"], "running");
    kept.destroy().await
}

#[tokio::test]
async fn both_names_of_the_resource_serve_the_same_sandbox() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service
        .create_unready(json!({ "metadata": { "owner": "me" } }))
        .await?;
    let (status, body) = service
        .get(&format!("/v1/capsules/{}", sandbox.id()))
        .await?;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(body["metadata"]["owner"], "me");
    let (_, list) = service.get("/v1/capsules").await?;
    assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
    sandbox.destroy().await
}

#[tokio::test]
async fn sandbox_has_the_requested_size_and_environment() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service
        .create_with(json!({
            "vcpus": 2, "memory_mb": 384, "disk_size_mb": 6144, "envs": { "COLOUR": "green" }
        }))
        .await?;
    assert_eq!(sandbox.exec("nproc", &[]).await?.stdout, "2\n");
    let memory: u64 = sandbox
        .shell("awk '/MemTotal/{print $2}' /proc/meminfo")
        .await?
        .stdout
        .trim()
        .parse()?;
    assert!((300_000..400_000).contains(&memory), "{memory} kB");
    assert_eq!(sandbox.shell("echo $COLOUR").await?.stdout, "green\n");
    let disk: u64 = until("the disk has grown", GENEROUS, async || {
        let df = sandbox.shell("df -Pm / | awk 'NR==2{print $2}'").await?;
        let size = df.stdout.trim().parse::<u64>()?;
        Ok((size > 2500).then_some(size))
    })
    .await?;
    assert!((5500..=6144).contains(&disk), "{disk} MiB");
    sandbox.destroy().await
}

#[tokio::test]
async fn metrics_are_live() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    let (status, metrics) = service.get(&sandbox.path("/metrics")).await?;
    assert_eq!(status, StatusCode::OK, "{metrics}");
    let number = |field: &str| metrics[field].as_u64().unwrap_or_default();
    assert!(number("mem_bytes") > 1 << 20, "{metrics}");
    assert!(number("mem_total_bytes") > number("mem_bytes"), "{metrics}");
    assert!(number("disk_bytes") > 1 << 20, "{metrics}");
    assert_eq!(number("cpu_count"), 1);
    sandbox.destroy().await
}
