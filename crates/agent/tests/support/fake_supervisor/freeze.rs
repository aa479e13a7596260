//! A freeze that writes files as a real one does, and fails where a test wants it to.

use std::{
    fs,
    path::{Path, PathBuf},
};

use wrenn_proto::supervise::{FrozenMachine, Reply, SupervisorSpec, files};
use wrenn_snapshot::{DiffWriter, layout};

pub(crate) fn freeze(
    dir: &Path,
    fake: &str,
    staging: &Path,
    build: &str,
    next_disk: Option<&Path>,
) -> Reply {
    if fake == "refuse-freeze" {
        return Reply::Refused {
            reason: "the VMM does not like it".to_owned(),
        };
    }
    let layers = layers(dir);
    fs::write(dir.join("frozen"), "").expect("room");
    if let Some(next) = next_disk {
        let mut all = layers.clone();
        all.push(next.to_owned());
        fs::write(
            dir.join("layers.json"),
            serde_json::to_vec(&all).expect("plain data"),
        )
        .expect("room");
    }
    write(dir, staging, build);
    if fake == "lose-answer" {
        // As if the connection broke.
        return Reply::Noted;
    }
    if fake == "unwritable-store" {
        // The snapshot cannot be put into its place any more.
        fs::remove_file(staging.join(layout::DEVICE)).expect("it was written");
    }
    Reply::Frozen(FrozenMachine {
        disk_layers: layers,
        ..FrozenMachine::default()
    })
}

/// Files of the disk that the machine has.
fn layers(dir: &Path) -> Vec<PathBuf> {
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
    let bytes = u64::from(spec.memory_mib) * 1024 * 1024;
    let build = build.parse().expect("a build id");
    let mut writer =
        DiffWriter::create(&staging.join(layout::MEMORY), build, bytes, None).expect("room");
    writer.push(0, &[7; 4096]).expect("room");
    let (header, _) = writer.finish().expect("room");
    fs::write(staging.join(layout::HEADER), header.to_bytes()).expect("room");
    fs::write(staging.join(layout::DEVICE), "state").expect("room");
}
