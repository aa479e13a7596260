//! Snapshots in an object store: a real S3 server on loopback.

use anyhow::{Context as _, Result, ensure};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use wrenn_e2e::{Sandbox, Service};
use wrenn_test_s3::{ACCESS_KEY, BUCKET, S3Server, SECRET_KEY};

/// Starts a service with its own data directory that uses the object store.
async fn service(server: &S3Server) -> Result<Service> {
    let mut service = Service::start_with("WRENN_STORE_URL", &url()).await?;
    let endpoint = server.endpoint();
    for (name, value) in [
        ("WRENN_STORE_ENDPOINT", endpoint.as_str()),
        ("WRENN_STORE_RETRY_SEC", "5"),
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
    ] {
        service.set(name, Some(value));
    }
    service.restart_with_fault(None).await?;
    Ok(service)
}

fn url() -> String {
    format!("s3://{BUCKET}/wrenn")
}

/// Returns the line of `wrenn doctor` about the object store.
fn doctor(service: &Service) -> Result<String> {
    let report = service.command("doctor").output()?;
    let report = String::from_utf8(report.stdout)?;
    let line = report.lines().find(|line| line.contains("object store"));
    Ok(line.context(report.clone())?.to_owned())
}

async fn post(service: &Service, path: &str, body: &Value) -> Result<(StatusCode, Value)> {
    service.json(Method::POST, path, body).await
}

async fn create(service: &Service, body: Value) -> Result<Sandbox<'_>> {
    let (status, made) = post(service, "/v1/sandboxes", &body).await?;
    ensure!(status.is_success(), "{made}");
    let id = made["id"].as_str().context("no id")?.to_owned();
    let sandbox = Sandbox::new(service, id);
    sandbox.until_status("running").await?;
    Ok(sandbox)
}

#[tokio::test]
async fn snapshot_of_one_data_directory_is_resumed_in_another_and_loads_what_it_touches()
-> Result<()> {
    let server = S3Server::start();
    let first = service(&server).await?;
    let source = create(&first, json!({})).await?;
    // Content that does not compress or repeat: 64 MiB in memory, and a file on the disk.
    let fill = "head -c 64M /dev/urandom >/dev/shm/large && head -c 3M /dev/urandom >/root/file \
        && sync && sha256sum /dev/shm/large /root/file";
    let sums = source.shell(fill).await?;
    ensure!(sums.code == 0, "{sums:?}");
    let body = json!({ "sandbox_id": source.id(), "name": "moved" });
    let (status, made) = post(&first, "/v1/snapshots", &body).await?;
    ensure!(status == StatusCode::CREATED, "{made}");
    let (status, answer) = post(&first, "/v1/snapshots/moved/push", &json!({})).await?;
    ensure!(
        status == StatusCode::NO_CONTENT,
        "{answer}\n{}",
        first.log()
    );
    let stored: u64 = server
        .objects("wrenn/mem")
        .iter()
        .map(|name| std::fs::metadata(server.object(name)).map_or(0, |meta| meta.len()))
        .sum();
    ensure!(stored > 64 << 20, "{stored} bytes");
    // Nothing is written twice.
    let writes = server.writes();
    let (status, _) = post(&first, "/v1/snapshots/moved/push", &json!({})).await?;
    ensure!(status == StatusCode::NO_CONTENT);
    assert_eq!(server.writes(), writes + 1, "only the record of the name");
    source.destroy().await?;

    let second = service(&server).await?;
    let (status, pulled) = post(&second, "/v1/snapshots/moved/pull", &json!({})).await?;
    ensure!(status == StatusCode::CREATED, "{pulled}\n{}", second.log());
    assert_eq!(pulled["name"], "moved");
    let before = server.read_bytes();
    let copy = create(&second, json!({ "template": "moved" })).await?;
    assert_eq!(copy.exec("true", &[]).await?.code, 0);
    let touched = server.read_bytes() - before;
    // The guest has not read its large file.
    assert!(touched < stored / 2, "{touched} of {stored} bytes");
    let again = copy.shell("sha256sum /dev/shm/large /root/file").await?;
    assert_eq!(again.stdout, sums.stdout);
    let all = server.read_bytes() - before;
    assert!(all > 60 << 20 && all <= stored, "{all} of {stored} bytes");
    // Another sandbox of the host finds the chunks in the cache.
    let other = create(&second, json!({ "template": "moved" })).await?;
    let again = other.shell("sha256sum /dev/shm/large").await?;
    assert!(sums.stdout.starts_with(again.stdout.trim()), "{again:?}");
    assert!(server.read_bytes() - before <= all + (2 << 20));
    other.destroy().await?;

    // A pause writes what has changed, and depends on the object store for the rest.
    copy.shell("echo changed >/dev/shm/small").await?;
    copy.pause().await?;
    copy.resume().await?;
    let again = copy
        .shell("cat /dev/shm/small; sha256sum /dev/shm/large /root/file")
        .await?;
    assert_eq!(again.stdout, format!("changed\n{}", sums.stdout));
    copy.destroy().await
}

#[tokio::test]
async fn guest_whose_memory_cannot_be_loaded_ends_with_the_reason_and_its_host_goes_on()
-> Result<()> {
    let server = S3Server::start();
    let first = service(&server).await?;
    let source = create(&first, json!({})).await?;
    let fill = "head -c 32M /dev/urandom >/dev/shm/large";
    ensure!(source.shell(fill).await?.code == 0);
    let body = json!({ "sandbox_id": source.id(), "name": "lost" });
    ensure!(post(&first, "/v1/snapshots", &body).await?.0 == StatusCode::CREATED);
    let push = post(&first, "/v1/snapshots/lost/push", &json!({})).await?;
    ensure!(push.0 == StatusCode::NO_CONTENT, "{push:?}");
    source.destroy().await?;

    let second = service(&server).await?;
    for (path, status, text) in [
        ("/v1/snapshots/unknown/pull", 404, "no snapshot `unknown`"),
        ("/v1/snapshots/unknown/push", 404, "no snapshot `unknown`"),
    ] {
        let (got, answer) = post(&second, path, &json!({})).await?;
        assert_eq!(got, status, "{answer}");
        assert!(answer.to_string().contains(text), "{answer}");
    }
    assert!(doctor(&second)?.starts_with("ok "));
    server.refuse(u64::MAX);
    assert!(doctor(&second)?.starts_with("fail "));
    let (status, answer) = post(&second, "/v1/snapshots/lost/pull", &json!({})).await?;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
    server.refuse(0);
    let pull = post(&second, "/v1/snapshots/lost/pull", &json!({})).await?;
    ensure!(pull.0 == StatusCode::CREATED, "{pull:?}");
    let (status, answer) = post(&second, "/v1/snapshots/lost/pull", &json!({})).await?;
    assert_eq!(status, StatusCode::CONFLICT, "{answer}");

    let copy = create(&second, json!({ "template": "lost" })).await?;
    ensure!(copy.exec("true", &[]).await?.code == 0);
    server.refuse(u64::MAX);
    let _ = copy.shell("cat /dev/shm/large | wc -c").await;
    let record = copy.until_status("error").await?;
    let reason = record["error"].as_str().unwrap_or_default();
    assert!(reason.contains("of artifact mem/"), "{reason}");
    // A sandbox that needs nothing of the store is not affected.
    let plain = create(&second, json!({})).await?;
    assert_eq!(plain.exec("true", &[]).await?.code, 0);
    plain.destroy().await?;
    copy.destroy().await
}

#[tokio::test]
async fn object_store_that_is_not_configured_is_named() -> Result<()> {
    let service = Service::start().await?;
    let (status, answer) = post(&service, "/v1/snapshots/any/pull", &json!({})).await?;
    assert_eq!(status, StatusCode::CONFLICT, "{answer}");
    assert!(answer.to_string().contains("WRENN_STORE_URL"), "{answer}");
    Ok(())
}
