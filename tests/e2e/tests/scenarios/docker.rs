//! Docker in a sandbox: installed from Debian's packages, with an image made on the spot.
//!
//! The host downloads the packages that the template lacks (apt, as for an image build). The guest
//! has no egress. `make soak` only, because it takes minutes where the guest is emulated.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use serde_json::json;
use wrenn_e2e::{
    Sandbox, Service,
    wait::{GENEROUS, until},
};

/// Directory in the guest for the packages.
const PACKAGES: &str = "/root/packages";

/// Starts the service, and makes an image that consists of busybox.
const START: &str = "
    service docker start
    until docker info >/dev/null 2>&1; do sleep 1; done
    mkdir -p /root/image/bin
    mv /root/busybox /root/image/bin/
    chmod +x /root/image/bin/busybox
    tar -C /root/image -c . | docker import - box";

/// Starts a container that serves its counter of seconds on port 8080 of the guest.
const SERVE: &str = "
    docker run -d --name counter -p 8080:80 -v /root/count:/count box /bin/busybox sh -c '
        busybox httpd -p 80 -h /count
        n=0
        while :; do n=$((n + 1)); echo $n >/count/n.tmp; busybox mv /count/n.tmp /count/n; busybox sleep 1; done'";

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {stderr}");
    Ok(())
}

/// Downloads `docker.io` and those of its dependencies that the guest lacks. `status` is the
/// guest's list of installed packages.
fn download(dir: &Path, status: &[u8]) -> Result<Vec<PathBuf>> {
    let installed = dir.join("status");
    fs::write(&installed, status)?;
    fs::create_dir_all(dir.join("archives/partial"))?;
    run(Command::new("apt-get")
        .args(["-o", &format!("Dir::State::status={}", installed.display())])
        .args(["-o", &format!("Dir::Cache={}", dir.display())])
        .args(["-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=1"])
        .args(["-y", "--no-install-recommends", "--download-only"])
        .args(["install", "docker.io"]))?;
    let entries = fs::read_dir(dir.join("archives"))?;
    let paths = entries.map(|entry| Ok(entry?.path()));
    let debs = paths
        .filter(|path| matches!(path, Ok(path) if path.extension().is_some_and(|e| e == "deb")));
    debs.collect()
}

/// Repacks a package without compression: an emulated guest would take minutes to decompress it.
fn decompress(deb: &Path) -> Result<()> {
    let tree = deb.with_extension("tree");
    run(Command::new("dpkg-deb").arg("-R").arg(deb).arg(&tree))?;
    run(Command::new("dpkg-deb")
        .args(["-Znone", "-b"])
        .args([&tree, deb]))?;
    Ok(fs::remove_dir_all(tree)?)
}

async fn install(sandbox: &Sandbox<'_>) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let status = sandbox.read("/var/lib/dpkg/status").await?;
    let debs = download(dir.path(), &status)?;
    ensure!(!debs.is_empty(), "no packages were downloaded");
    for deb in debs {
        decompress(&deb)?;
        let name = deb.file_name().context("no name")?.to_string_lossy();
        let place = format!("{PACKAGES}/{name}");
        sandbox.upload(&place, &deb).await?;
        fs::remove_file(&deb)?;
    }
    let install = format!("dpkg --install {PACKAGES}/*.deb && rm -r {PACKAGES}");
    sandbox.script(&install).await?;
    sandbox
        .upload("/root/busybox", Path::new("/bin/busybox"))
        .await
}

/// Returns the number that the container serves.
async fn count(sandbox: &Sandbox<'_>) -> Result<u64> {
    let output = sandbox.shell("curl -s http://127.0.0.1:8080/n").await?;
    Ok(output.stdout.trim().parse().unwrap_or(0))
}

/// Checks that the container still counts, and that a new one runs.
async fn use_docker(sandbox: &Sandbox<'_>) -> Result<()> {
    let seen = count(sandbox).await?;
    until("the container counts", GENEROUS, async || {
        Ok((count(sandbox).await? > seen).then_some(()))
    })
    .await?;
    let line = "docker run --rm box /bin/busybox echo from a container";
    assert_eq!(sandbox.script(line).await?, "from a container\n");
    let running = sandbox.script("docker ps --format '{{.Names}}'").await?;
    assert_eq!(running, "counter\n");
    Ok(())
}

#[tokio::test]
async fn containers_run_across_a_pause_and_from_a_snapshot() -> Result<()> {
    let service = Service::start().await?;
    let body = json!({ "memory_mb": 1024, "disk_size_mb": 8192 });
    let sandbox = service.create_with(body).await?;
    install(&sandbox).await?;
    sandbox.script(START).await?;
    sandbox.script(SERVE).await?;
    use_docker(&sandbox).await?;
    sandbox.pause().await?;
    sandbox.resume().await?;
    use_docker(&sandbox).await?;

    let body = json!({ "sandbox_id": sandbox.id(), "name": "with-docker" });
    let (status, reply) = service.json(Method::POST, "/v1/snapshots", &body).await?;
    ensure!(status.is_success(), "{status}: {reply}");
    use_docker(&sandbox).await?;
    sandbox.destroy().await?;
    let copy = service
        .create_with(json!({ "template": "with-docker" }))
        .await?;
    use_docker(&copy).await?;
    copy.destroy().await
}
