//! Upgrades from release 0.1.0: sandboxes, snapshots and keys of its service are used by this
//! release. `make soak` builds the programs and the templates of 0.1.0 and names their directory
//! in `WRENN_RELEASE_0_1_0`.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use serde_json::json;
use wrenn_e2e::{Sandbox, Service, host::vmm_of};

/// Directory of the programs and templates of release 0.1.0.
fn earlier() -> Result<PathBuf> {
    let dir = std::env::var_os("WRENN_RELEASE_0_1_0");
    let dir =
        dir.context("WRENN_RELEASE_0_1_0 is not set: run the upgrade tests by `make soak`")?;
    Ok(dir.into())
}

/// Starts a counter: a process in the guest that writes increasing numbers to a file.
async fn start_counter(service: &Service, sandbox: &Sandbox<'_>) -> Result<()> {
    // By rename, so that a reader never finds an empty file.
    let script = "n=0; while :; do n=$((n+1)); echo $n > /tmp/next; mv /tmp/next /tmp/count; sleep 0.2; done";
    let body = json!({ "cmd": "sh", "args": ["-c", script], "background": true });
    let (status, reply) = service
        .json(Method::POST, &sandbox.path("/exec"), &body)
        .await?;
    ensure!(status.is_success(), "{status} {reply}");
    Ok(())
}

async fn count(sandbox: &Sandbox<'_>) -> Result<u64> {
    let text = sandbox.read("/tmp/count").await?;
    String::from_utf8(text)?
        .trim()
        .parse()
        .context("the counter has not written yet")
}

/// Waits until the counter of a sandbox increases.
async fn counts_on(sandbox: &Sandbox<'_>, from: u64) -> Result<u64> {
    wrenn_e2e::wait::until(
        "the counter continues",
        wrenn_e2e::wait::GENEROUS,
        async || Ok(count(sandbox).await.ok().filter(|n| *n > from)),
    )
    .await
}

/// Ids of the sandboxes that release 0.1.0 left.
struct Left {
    running: String,
    running_count: u64,
    paused: String,
    paused_count: u64,
}

/// Creates a running sandbox, a paused one that was resumed once, and a named snapshot.
async fn leave_sandboxes(service: &Service) -> Result<Left> {
    let running = service.create().await?;
    running
        .write("/home/user/note", "of a running sandbox")
        .await?;
    start_counter(service, &running).await?;
    let running_count = counts_on(&running, 0).await?;
    let paused = service.create().await?;
    start_counter(service, &paused).await?;
    counts_on(&paused, 0).await?;
    paused.pause().await?;
    paused.resume().await?;
    paused
        .write("/home/user/note", "of a paused sandbox")
        .await?;
    let body = json!({ "sandbox_id": paused.id(), "name": "earlier" });
    let (status, reply) = service.json(Method::POST, "/v1/snapshots", &body).await?;
    ensure!(status.is_success(), "{status} {reply}");
    let paused_count = counts_on(&paused, 0).await?;
    paused.pause().await?;
    Ok(Left {
        running: running.id().to_owned(),
        running_count,
        paused: paused.id().to_owned(),
        paused_count,
    })
}

/// Checks that a running sandbox continues, and survives a pause and a resume.
async fn use_running(service: &Service, left: &Left) -> Result<()> {
    let sandbox = Sandbox::new(service, left.running.clone());
    assert_eq!(sandbox.record().await?["status"], "running");
    assert_eq!(
        sandbox.read("/home/user/note").await?,
        b"of a running sandbox"
    );
    let seen = counts_on(&sandbox, left.running_count).await?;
    sandbox.pause().await?;
    assert_eq!(vmm_of(&left.running), None);
    sandbox.resume().await?;
    counts_on(&sandbox, seen).await?;
    assert_eq!(sandbox.exec("true", &[]).await?.code, 0);
    sandbox.destroy().await
}

/// Checks that a paused sandbox continues where it was paused, and survives another pause.
async fn use_paused(service: &Service, left: &Left) -> Result<()> {
    let sandbox = Sandbox::new(service, left.paused.clone());
    assert_eq!(sandbox.record().await?["status"], "paused");
    sandbox.resume().await?;
    assert_eq!(
        sandbox.read("/home/user/note").await?,
        b"of a paused sandbox"
    );
    let seen = counts_on(&sandbox, left.paused_count).await?;
    sandbox.pause().await?;
    sandbox.resume().await?;
    counts_on(&sandbox, seen).await?;
    sandbox.destroy().await
}

/// Checks that the named snapshot spawns sandboxes, and that a template of 0.1.0 does.
async fn use_templates(service: &Service) -> Result<()> {
    let spawned = service
        .create_with(json!({ "template": "earlier" }))
        .await?;
    assert_eq!(
        spawned.read("/home/user/note").await?,
        b"of a paused sandbox"
    );
    counts_on(&spawned, 0).await?;
    spawned.destroy().await?;
    let fresh = service.create().await?;
    assert_eq!(fresh.exec("true", &[]).await?.code, 0);
    fresh.destroy().await
}

#[tokio::test]
async fn the_sandboxes_of_release_0_1_0_are_used_after_an_orderly_upgrade() -> Result<()> {
    let mut service = Service::start_release(&earlier()?).await?;
    let left = leave_sandboxes(&service).await?;
    let key = service.key().to_owned();
    let vmm = vmm_of(&left.running).context("no VMM")?;
    service.stop().await?;

    service.use_this_release();
    service.start_again().await?;
    assert_eq!(service.key(), key);
    assert_eq!(vmm_of(&left.running), Some(vmm));
    use_running(&service, &left).await?;
    use_paused(&service, &left).await?;
    use_templates(&service).await
}

#[tokio::test]
async fn the_sandboxes_of_release_0_1_0_are_used_after_it_was_killed() -> Result<()> {
    let mut service = Service::start_release(&earlier()?).await?;
    let left = leave_sandboxes(&service).await?;
    service.kill()?;

    service.use_this_release();
    service.start_again().await?;
    use_running(&service, &left).await?;
    use_paused(&service, &left).await?;
    use_templates(&service).await
}
