//! What a snapshot is of: everything but memory, devices and disk that is needed to bring the machine back.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};
use wrenn_proto::supervise::Accel;

use crate::BuildId;

/// Version of this structure.
const VERSION: u32 = 1;

/// `manifest.json`. Fields are only added, with a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// 1.
    pub version: u32,
    /// This moment.
    pub build: BuildId,
    /// When it was frozen, milliseconds since 1970.
    pub created_unix_ms: i64,
    /// Kind of VMM whose device state this is, and its version: `qemu 7.2.22`.
    pub vmm: String,
    /// How guest code was run. Device state does not fit the other way.
    pub accel: Accel,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// Disk as the guest sees it, MiB.
    pub disk_mib: u32,
    /// Kernel that was booted.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub initrd: PathBuf,
    /// The image under the disk.
    pub base_disk: PathBuf,
    /// Layers of the disk on that image, the lowest first; files of the store.
    pub disk_layers: Vec<BuildId>,
    /// Template that the machine was made from.
    pub template: String,
    /// User that commands run as when a request names none.
    pub default_user: String,
    /// Token that the frozen guest agent asks of its clients.
    pub guest_token: String,
    /// Environment that the machine's commands were given. None in snapshots of earlier versions.
    #[serde(default)]
    pub envs: BTreeMap<String, String>,
    /// XXH3-64 of the state of its devices. Filled in when the snapshot is published; none in snapshots of earlier versions.
    #[serde(default)]
    pub device_checksum: Option<u64>,
}

/// Why bytes are not a manifest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Not the JSON that it should be.
    #[error("it is not a manifest")]
    Json(#[from] serde_json::Error),
    /// From a later Wrenn.
    #[error("it is of version {0}; this Wrenn reads version {VERSION}")]
    Version(u32),
}

impl Manifest {
    /// Reads a manifest.
    ///
    /// # Errors
    /// If it is none, or of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let manifest: Self = serde_json::from_slice(bytes)?;
        if manifest.version == VERSION {
            Ok(manifest)
        } else {
            Err(ManifestError::Version(manifest.version))
        }
    }
}
