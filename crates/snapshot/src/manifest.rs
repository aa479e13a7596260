//! Manifest of a snapshot: all data required to restore the VM, except memory, device state and
//! disk.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};
use wrenn_model::{CpuModel, MachineSize};
use wrenn_proto::{machine::MachineProfile, supervise::Accel};

use crate::SnapshotId;

/// Version of this structure.
const VERSION: u32 = 1;

/// Content of `manifest.json`. Fields are only added, with a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the structure, 1.
    pub version: u32,
    /// Id of this snapshot.
    pub build: SnapshotId,
    /// Time of the snapshot, in milliseconds since 1970.
    pub created_unix_ms: i64,
    /// Kind and version of the VMM that wrote the device state: `qemu 7.2.22`.
    pub vmm: String,
    /// Accelerator that ran guest code. The device state is not compatible with another
    /// accelerator.
    pub accel: Accel,
    /// CPU model of the VM; `None` in snapshots of release 0.1.0. See [`Self::cpu`].
    #[serde(default, rename = "cpu")]
    pub cpu_model: Option<CpuModel>,
    /// Virtual hardware of the VM; `None` in snapshots of release 0.1.0. See [`Self::profile`].
    #[serde(default)]
    pub machine: Option<MachineProfile>,
    /// Processor of the host, if the guest sees it. `None` if the CPU model determines what the
    /// guest sees, and in snapshots of release 0.1.0.
    #[serde(default)]
    pub host_cpu: Option<String>,
    /// Virtual CPUs, memory and disk.
    #[serde(flatten)]
    pub size: MachineSize,
    /// Kernel that the VM booted. This and the next two paths are relative to the image directory,
    /// or absolute if the file is elsewhere; always absolute in snapshots of earlier versions.
    pub kernel: PathBuf,
    /// Initial RAM disk of the kernel.
    pub initrd: PathBuf,
    /// Image at the base of the disk.
    pub base_disk: PathBuf,
    /// UUID of the ext4 file system in that image, 32 hexadecimal digits. An image that is built
    /// again has the same path and another UUID. `None` if the image has none, and in snapshots of
    /// earlier versions.
    #[serde(default)]
    pub base_disk_uuid: Option<String>,
    /// Layers of the disk on top of that image, lowest first; files of the store.
    pub disk_layers: Vec<SnapshotId>,
    /// Template that the sandbox was created from.
    pub template: String,
    /// User that commands run as if a request names none.
    pub default_user: String,
    /// Token that the guest agent in the snapshot requires from its clients.
    pub guest_token: String,
    /// Environment of the sandbox's commands. Empty in snapshots of earlier versions.
    #[serde(default)]
    pub envs: BTreeMap<String, String>,
    /// XXH3-64 of the device state. Set when the snapshot is published; `None` in snapshots of
    /// earlier versions.
    #[serde(default)]
    pub device_checksum: Option<u64>,
}

/// Reason why bytes are not a valid manifest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// The JSON does not have the expected structure.
    #[error("failed to decode the manifest")]
    Json(#[from] serde_json::Error),
    /// The manifest was written by a later version of Wrenn.
    #[error("manifest version {0} is not supported, expected {VERSION}")]
    Version(u32),
}

impl Manifest {
    /// Returns the CPU model that the saved state requires.
    #[must_use]
    pub fn cpu(&self) -> CpuModel {
        let model = self.cpu_model.clone();
        model.unwrap_or_else(|| self.accel.cpu_of_0_1_0())
    }

    /// Parses a manifest.
    ///
    /// # Errors
    /// Fails if the bytes are not a manifest, or have another version.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let manifest: Self = serde_json::from_slice(bytes)?;
        if manifest.version == VERSION {
            Ok(manifest)
        } else {
            Err(ManifestError::Version(manifest.version))
        }
    }

    /// Returns the virtual hardware that the saved state requires.
    #[must_use]
    pub fn profile(&self) -> MachineProfile {
        let profile = self.machine.clone();
        profile.unwrap_or_else(MachineProfile::first)
    }
}
