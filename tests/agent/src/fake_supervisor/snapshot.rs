//! Fake snapshot: writes files as the real one does, and fails where a test requests it.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use wrenn_proto::supervise::{RejectionCode, Reply, SnapshotReport, SupervisorSpec, files};
use wrenn_snapshot::{DiffWriter, layout};

/// Returns the current fault, which a test writes to a file in the sandbox's directory.
pub(crate) fn fault(dir: &Path) -> String {
    fs::read_to_string(dir.join("fault")).unwrap_or_default()
}

pub(crate) async fn take(
    dir: &Path,
    staging: &Path,
    build: &str,
    next_disk: Option<&Path>,
) -> Reply {
    let fault = fault(dir);
    let rejected = || Reply::rejected("the VMM rejected the snapshot");
    if fault == "reject-snapshot" {
        return rejected();
    }
    if fault == "full-disk" {
        let reason = "the disk of the host is full".to_owned();
        let code = Some(RejectionCode::OutOfSpace);
        return Reply::Rejected { reason, code };
    }
    let layers = layers(dir);
    fs::write(dir.join("paused"), "").expect("room");
    if fault == "slow-snapshot" {
        fs::write(dir.join("snapshotting"), "").expect("room");
        // Until the test removes the file.
        while dir.join("snapshotting").exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    if let Some(next) = next_disk {
        let mut all = layers.clone();
        all.push(next.to_owned());
        fs::write(
            dir.join("layers.json"),
            serde_json::to_vec(&all).expect("plain data"),
        )
        .expect("room");
    }
    if fault == "fail-after-switch" {
        fs::remove_file(dir.join("paused")).expect("it was made");
        return rejected();
    }
    write(dir, staging, build);
    if fault == "lose-answer" {
        // As if the connection had been interrupted.
        return Reply::Noted;
    }
    if fault == "unwritable-store" {
        // The snapshot can no longer be published.
        fs::remove_file(staging.join(layout::DEVICE)).expect("it was written");
    }
    Reply::SnapshotTaken(SnapshotReport {
        disk_layers: layers,
        ..SnapshotReport::default()
    })
}

/// Returns the disk files of the VM.
pub(crate) fn layers(dir: &Path) -> Vec<PathBuf> {
    let kept = fs::read(dir.join("layers.json")).ok();
    if let Some(kept) = kept {
        return serde_json::from_slice(&kept).expect("own output");
    }
    let spec = fs::read(dir.join(files::SPEC)).expect("a specification");
    let spec: SupervisorSpec = serde_json::from_slice(&spec).expect("a specification");
    let mut all = spec.disk_layers;
    all.push(dir.join(files::DISK));
    all
}

fn write(dir: &Path, staging: &Path, build: &str) {
    let spec = fs::read(dir.join(files::SPEC)).expect("a specification");
    let spec: SupervisorSpec = serde_json::from_slice(&spec).expect("a specification");
    let bytes = spec.size.memory_bytes();
    let build = build.parse().expect("a build id");
    let mut writer =
        DiffWriter::create(&staging.join(layout::MEMORY), build, bytes, None).expect("room");
    writer.push(0, &[7; 4096]).expect("room");
    let (header, _) = writer.finish().expect("room");
    fs::write(staging.join(layout::HEADER), header.to_bytes()).expect("room");
    fs::write(staging.join(layout::DEVICE), "state").expect("room");
}
