//! A service that is started with another database leaves the sandboxes of the first database
//! unchanged.

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use wrenn_e2e::{
    Sandbox, Service,
    host::vmm_of,
    wait::{GENEROUS, until},
};

async fn unknown(service: &Service) -> Result<Vec<String>> {
    let output = service
        .command("sandbox")
        .args(["ls", "--unknown", "--quiet"])
        .output()?;
    ensure!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// Waits until the reconciler of a service has logged that it leaves these sandboxes unchanged.
async fn wait_for_looks(service: &Service, ids: &[&str]) -> Result<()> {
    until("the reconciler has looked", GENEROUS, async || {
        let log = service.log();
        let left_alone = |id: &&str| {
            log.lines()
                .any(|line| line.contains("left alone") && line.contains(*id))
        };
        Ok(ids.iter().all(left_alone).then_some(()))
    })
    .await
}

#[tokio::test]
async fn wrong_database_ends_no_sandbox_and_the_right_one_manages_them_again() -> Result<()> {
    let mut service = Service::start().await?;
    let running = service.create().await?.id().to_owned();
    let paused = service.create().await?;
    paused.pause().await?;
    let paused = paused.id().to_owned();
    Sandbox::new(&service, running.clone())
        .write("/home/user/note", "kept")
        .await?;
    let vmm = vmm_of(&running).context("no VMM")?;
    service.stop().await?;

    // The service is started with a mistyped database name, so the database is empty.
    service.use_database(Some("another.db"));
    service.start_again().await?;
    wait_for_looks(&service, &[&running, &paused]).await?;
    let mut all = vec![running.clone(), paused.clone()];
    all.sort();
    assert_eq!(unknown(&service).await?, all);
    let (_, list) = service.get("/v1/sandboxes?status=all").await?;
    assert_eq!(list, json!([]));
    // The service can create and use sandboxes of its own.
    let own = service.create().await?;
    assert_eq!(own.exec("true", &[]).await?.code, 0);
    own.destroy().await?;
    assert_eq!(vmm_of(&running), Some(vmm));
    service.stop().await?;

    service.use_database(None);
    service.start_again().await?;
    let sandbox = Sandbox::new(&service, running.clone());
    assert_eq!(sandbox.record().await?["status"], "running");
    assert_eq!(sandbox.read("/home/user/note").await?, b"kept");
    assert_eq!(vmm_of(&running), Some(vmm));
    let sandbox = Sandbox::new(&service, paused);
    assert_eq!(sandbox.record().await?["status"], "paused");
    sandbox.resume().await?;
    assert!(unknown(&service).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn unknown_sandboxes_are_adopted_and_destroyed_by_command() -> Result<()> {
    let mut service = Service::start().await?;
    let (kept, ended) = (service.create().await?, service.create().await?);
    let (kept, ended) = (kept.id().to_owned(), ended.id().to_owned());
    service.stop().await?;
    service.use_database(Some("another.db"));
    service.start_again().await?;

    let run = |args: &[&str]| -> Result<()> {
        let output = service.command("sandbox").args(args).output()?;
        ensure!(output.status.success(), "{args:?}: {output:?}");
        Ok(())
    };
    run(&["adopt", &kept])?;
    run(&["rm", "--unknown", &ended])?;
    assert!(unknown(&service).await?.is_empty());
    assert_eq!(vmm_of(&ended), None);
    let sandbox = Sandbox::new(&service, kept.clone());
    assert_eq!(sandbox.exec("true", &[]).await?.code, 0);
    service.stop().await?;

    // The first database still has rows of both sandboxes. One now belongs to another installation.
    service.use_database(None);
    service.start_again().await?;
    let path = format!("/v1/sandboxes/{kept}");
    let (status, body) = service.json(Method::DELETE, &path, &Value::Null).await?;
    assert!(
        !status.is_success() && body.to_string().contains("belongs to installation"),
        "{status} {body}"
    );
    assert!(vmm_of(&kept).is_some());
    Sandbox::new(&service, ended).until_status("error").await?;
    // Only the installation that owns the sandbox may destroy it.
    service.stop().await?;
    service.use_database(Some("another.db"));
    service.start_again().await?;
    Ok(())
}
