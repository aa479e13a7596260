//! Manifest of version 1.

use std::{collections::BTreeMap, path::PathBuf};

use serde::Deserialize;
use wrenn_model::{CpuModel, MachineSize};
use wrenn_proto::{machine::MachineProfile, supervise::Accel};

use super::{ImageFile, Layer, Requirements, VmmVersion};
use crate::SnapshotId;

/// Content of `manifest.json` in version 1.
#[derive(Deserialize)]
pub(super) struct Manifest {
    build: SnapshotId,
    created_unix_ms: i64,
    vmm: String,
    accel: Accel,
    /// `None` in snapshots of release 0.1.0.
    #[serde(default, rename = "cpu")]
    cpu_model: Option<CpuModel>,
    /// `None` in snapshots of release 0.1.0.
    #[serde(default)]
    machine: Option<MachineProfile>,
    #[serde(default)]
    host_cpu: Option<String>,
    #[serde(flatten)]
    size: MachineSize,
    /// Relative to the image directory, or absolute; always absolute in release 0.1.0. The same
    /// applies to the next two.
    kernel: PathBuf,
    initrd: PathBuf,
    base_disk: PathBuf,
    #[serde(default)]
    base_disk_uuid: Option<String>,
    disk_layers: Vec<SnapshotId>,
    template: String,
    default_user: String,
    guest_token: String,
    #[serde(default)]
    envs: BTreeMap<String, String>,
    #[serde(default)]
    device_checksum: Option<u64>,
}

impl From<Manifest> for super::Manifest {
    fn from(old: Manifest) -> Self {
        Self {
            version: super::VERSION,
            build: old.build,
            created_unix_ms: old.created_unix_ms,
            requires: Requirements {
                vmm: VmmVersion::from(old.vmm.as_str()),
                accel: old.accel,
                cpu: old.cpu_model.unwrap_or_else(|| old.accel.cpu_of_0_1_0()),
                machine: old.machine.unwrap_or_else(MachineProfile::first),
                host_cpu: old.host_cpu,
            },
            size: old.size,
            kernel: ImageFile::at(old.kernel),
            initrd: ImageFile::at(old.initrd),
            base_disk: ImageFile {
                uuid: old.base_disk_uuid,
                ..ImageFile::at(old.base_disk)
            },
            disk_layers: old.disk_layers.into_iter().map(Layer::unknown).collect(),
            memory: Vec::new(),
            header: None,
            device: None,
            device_checksum: old.device_checksum,
            template: old.template,
            default_user: old.default_user,
            guest_token: old.guest_token,
            envs: old.envs,
        }
    }
}
