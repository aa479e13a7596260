//! Replacement of the VMM: snapshots of another release of the same series are restored, those of
//! another series are refused with the reason and booted on request, and template snapshots are
//! renewed.
//!
//! There is one QEMU on this machine. In its place, the recorded version in the manifests changes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use wrenn_e2e::{
    Sandbox, Service,
    host::vmm_of,
    wait::{GENEROUS, until},
};

/// Returns the manifest of the snapshot that was taken last.
fn last_manifest(service: &Service) -> Result<PathBuf> {
    let snapshots = fs::read_dir(service.dir().join("snapshots/snapshots"))?.flatten();
    let newest = snapshots
        .map(|entry| entry.path().join("manifest.json"))
        .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
        .max();
    Ok(newest.context("no snapshot")?.1)
}

/// Changes a manifest. The file is replaced, because it may be linked elsewhere.
fn change(path: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut manifest: Value = serde_json::from_slice(&fs::read(path)?)?;
    change(&mut manifest);
    fs::remove_file(path)?;
    Ok(fs::write(path, manifest.to_string())?)
}

/// Makes a manifest that of a VMM of another series. Templates that were made by an earlier version
/// have manifests of version 1.
fn set_other_vmm(manifest: &mut Value) {
    match manifest.get_mut("requires") {
        Some(requires) => requires["vmm"]["version"] = "9.1.3".into(),
        None => manifest["vmm"] = "qemu 9.1.3".into(),
    }
}

/// Creates a sandbox of the template's size, which is restored from the template's snapshot.
async fn create(service: &Service) -> Result<Sandbox<'_>> {
    service.create_with(json!({ "memory_mb": 512 })).await
}

#[tokio::test]
async fn a_release_of_the_same_series_restores_and_another_series_boots_on_request() -> Result<()> {
    let mut service = Service::start().await?;
    let id = {
        let sandbox = create(&service).await?;
        let note = "echo kept | tee /root/note >/dev/shm/note && sync";
        assert_eq!(sandbox.shell(note).await?.code, 0);
        sandbox.pause().await?;
        let path = last_manifest(&service)?;
        change(&path, |manifest| {
            let version = &mut manifest["requires"]["vmm"]["version"];
            let (series, _) = version.as_str().and_then(|v| v.rsplit_once('.')).unwrap();
            *version = format!("{series}.1").into();
        })?;
        sandbox.resume().await?;
        assert_eq!(sandbox.shell("cat /dev/shm/note").await?.stdout, "kept\n");
        sandbox.pause().await?;
        let path = last_manifest(&service)?;
        change(&path, set_other_vmm)?;
        sandbox.id().to_owned()
    };
    // The reason is known before a client tries, if the VMM was replaced while the service was
    // down.
    service.stop().await?;
    service.start_again().await?;
    let sandbox = Sandbox::new(&service, id);
    let warned = until("the sandbox warns", GENEROUS, async || {
        let warning = sandbox.record().await?["warning"].to_string();
        Ok(warning.contains("qemu 9.1.3").then_some(warning))
    });
    let warned = warned.await.with_context(|| service.log())?;
    assert!(warned.contains("`memory` false"), "{warned}");
    let (status, refused) = service
        .json(Method::POST, &sandbox.path("/resume"), &json!({}))
        .await?;
    assert_eq!(status, StatusCode::CONFLICT, "{refused}");
    assert!(refused.to_string().contains("qemu 9.1.3"), "{refused}");
    assert_eq!(sandbox.record().await?["status"], "paused");

    let (status, booted) = service
        .json(
            Method::POST,
            &sandbox.path("/resume"),
            &json!({ "memory": false }),
        )
        .await?;
    assert_eq!(
        (status, &booted["status"]),
        (StatusCode::OK, &json!("running"))
    );
    assert_eq!(sandbox.shell("cat /root/note").await?.stdout, "kept\n");
    assert_ne!(sandbox.shell("cat /dev/shm/note").await?.code, 0);
    // From here on, it has memory of this VMM again.
    sandbox.pause().await?;
    sandbox.resume().await?;
    assert_eq!(sandbox.record().await?["warning"], Value::Null);
    sandbox.destroy().await
}

/// The VM of a snapshot has the devices that the snapshot names, not those of a new VM.
#[tokio::test]
async fn a_vm_is_restored_with_the_devices_of_its_snapshot() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = create(&service).await?;
    sandbox.pause().await?;
    let path = last_manifest(&service)?;
    let good = fs::read(&path)?;
    // As in a snapshot of release 0.1.0. The state of the memory balloon has no device then.
    change(&path, |manifest| {
        manifest["requires"]["machine"]["devices"] = json!([]);
    })?;
    let (status, refused) = service
        .json(Method::POST, &sandbox.path("/resume"), &json!({}))
        .await?;
    assert!(!status.is_success(), "{refused}");
    change(&path, |manifest| {
        manifest["requires"]["machine"]["devices"] = json!(["of_a_later_version"]);
    })?;
    let (status, refused) = service
        .json(Method::POST, &sandbox.path("/resume"), &json!({}))
        .await?;
    assert_eq!(status, StatusCode::CONFLICT, "{refused}");
    fs::write(&path, good)?;
    sandbox.resume().await?;
    assert_eq!(sandbox.exec("true", &[]).await?.code, 0);
    sandbox.destroy().await
}

/// Copies the images, as links, and makes the snapshots of `minimal` those of another VMM.
fn images_of_another_vmm(root: &Path) -> Result<PathBuf> {
    let original = std::env::var_os("WRENN_IMAGES_DIR").context("WRENN_IMAGES_DIR is not set")?;
    let original = fs::canonicalize(original)?;
    let copy = root.join("images");
    let status = std::process::Command::new("cp")
        .arg("-al")
        .args([&original, &copy])
        .status()?;
    ensure!(status.success(), "`cp` failed: {status}");
    for entry in fs::read_dir(copy.join("snapshots/snapshots"))?.flatten() {
        let path = entry.path().join("manifest.json");
        let text = fs::read_to_string(&path)?;
        let text = text.replace(&*original.to_string_lossy(), &copy.to_string_lossy());
        fs::remove_file(&path)?;
        fs::write(&path, text)?;
        change(&path, |manifest| {
            if manifest["template"] == "minimal" {
                set_other_vmm(manifest);
            }
        })?;
    }
    Ok(copy)
}

fn is_restored(sandbox: &Sandbox<'_>) -> Result<bool> {
    let pid = vmm_of(sandbox.id()).context("no VMM")?;
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
    Ok(line.split('\0').any(|argument| argument == "-incoming"))
}

#[tokio::test]
async fn a_template_snapshot_of_another_series_is_renewed_while_creates_boot() -> Result<()> {
    // Beside the images, so that files can be linked.
    let images = std::env::var_os("WRENN_IMAGES_DIR").context("WRENN_IMAGES_DIR is not set")?;
    let beside = fs::canonicalize(images)?;
    let beside = beside.parent().context("the images have no parent")?;
    let root = tempfile::Builder::new()
        .prefix("wrenn-e2e-images-")
        .tempdir_in(beside)?;
    let images = images_of_another_vmm(root.path())?;
    let service = Service::start_with_images(&images).await?;
    let booted = create(&service).await?;
    assert!(!is_restored(&booted)?);
    booted.destroy().await?;
    until("the template snapshot is renewed", GENEROUS, async || {
        Ok(service
            .log()
            .contains("template snapshot renewed")
            .then_some(()))
    })
    .await?;
    let restored = create(&service).await?;
    assert!(is_restored(&restored)?);
    assert_eq!(restored.exec("true", &[]).await?.code, 0);
    restored.destroy().await
}
