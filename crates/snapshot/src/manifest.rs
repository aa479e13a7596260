//! Manifest of a snapshot: everything that is required to restore the VM, by id.
//!
//! A manifest names artifacts and no places, so a snapshot can be moved and copied. It has the length
//! and the checksums of each artifact's chunks, as far as they are known: of artifacts of snapshots
//! that earlier versions made, they are not.
//!
//! | version | written by                | contains                                               |
//! |---------|---------------------------|--------------------------------------------------------|
//! | 1       | releases up to 0.1.0      | paths of the image's files, ids of disk layers         |
//! | 2       | this version              | ids and checksums of all artifacts, and requirements   |
//!
//! A manifest of version 1 is converted when it is read ([`v1`]). It is not written again.

mod v1;

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};
use wrenn_model::{CpuModel, MachineSize};
use wrenn_proto::{machine::MachineProfile, supervise::Accel};
use wrenn_store::{Artifact, ArtifactId, Content, Kind};

use crate::SnapshotId;

/// Version of this structure.
const VERSION: u32 = 2;

/// Content of `manifest.json`. Fields are only added, with a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the structure, 2.
    pub version: u32,
    /// Id of this snapshot.
    pub build: SnapshotId,
    /// Time of the snapshot, in milliseconds since 1970.
    pub created_unix_ms: i64,
    /// Requirements of the saved state of CPUs and devices.
    pub requires: Requirements,
    /// Virtual CPUs, memory and disk.
    #[serde(flatten)]
    pub size: MachineSize,
    /// Kernel that the VM booted.
    pub kernel: ImageFile,
    /// Initial RAM disk of the kernel.
    pub initrd: ImageFile,
    /// Image at the base of the disk.
    pub base_disk: ImageFile,
    /// Layers of the disk on top of that image, lowest first.
    pub disk_layers: Vec<Layer>,
    /// Memory diffs that the header refers to. Empty in manifests of version 1.
    pub memory: Vec<Artifact>,
    /// Memory header; `None` in manifests of version 1.
    pub header: Option<Artifact>,
    /// State of CPUs and devices; `None` in manifests of version 1.
    pub device: Option<Artifact>,
    /// XXH3-64 of the device state in manifests of version 1, as far as it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_checksum: Option<u64>,
    /// Template that the sandbox was created from.
    pub template: String,
    /// User that commands run as if a request names none.
    pub default_user: String,
    /// Token that the guest agent in the snapshot requires from its clients.
    pub guest_token: String,
    /// Environment of the sandbox's commands.
    #[serde(default)]
    pub envs: BTreeMap<String, String>,
}

/// Requirements of a saved device state to the host that loads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requirements {
    /// VMM that wrote the state.
    pub vmm: VmmVersion,
    /// Accelerator that ran guest code.
    pub accel: Accel,
    /// CPU model of the VM.
    pub cpu: CpuModel,
    /// Machine type, and devices that not every VM has.
    pub machine: MachineProfile,
    /// Processor of the host, if the guest sees it. `None` if the CPU model determines what the
    /// guest sees, and in snapshots of release 0.1.0.
    #[serde(default)]
    pub host_cpu: Option<String>,
}

/// Kind and version of a VMM, written as `qemu 7.2.22`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmVersion {
    /// Kind, such as `qemu`.
    pub kind: String,
    /// Version, such as `7.2.22`; empty if unknown.
    pub version: String,
}

impl From<&str> for VmmVersion {
    fn from(text: &str) -> Self {
        let (kind, version) = text.split_once(' ').unwrap_or((text, ""));
        Self {
            kind: kind.to_owned(),
            version: version.to_owned(),
        }
    }
}

impl std::fmt::Display for VmmVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.kind)?;
        match self.version.is_empty() {
            true => Ok(()),
            false => write!(f, " {}", self.version),
        }
    }
}

/// File of the template's image.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageFile {
    /// The file; `None` in manifests of version 1, which name it by its path only.
    #[serde(default)]
    pub artifact: Option<Artifact>,
    /// Path of the file when the snapshot was made. Relative to the image directory if the file was
    /// there. A file with the right content is looked for in the image directory first.
    pub path: PathBuf,
    /// UUID of the ext4 file system in the file, 32 hexadecimal digits. Only in manifests of version
    /// 1, as far as it is known: an image that is built again has the same path and another UUID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
}

impl ImageFile {
    /// Returns the file at a path whose content is not known.
    #[must_use]
    pub const fn at(path: PathBuf) -> Self {
        Self {
            artifact: None,
            path,
            uuid: None,
        }
    }
}

/// Layer of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "LayerText", into = "LayerText")]
pub struct Layer {
    /// Id of the layer.
    pub build: SnapshotId,
    /// Length and checksums; `None` for layers of earlier versions.
    pub content: Option<Content>,
}

/// Form of a layer in JSON.
#[derive(Serialize, Deserialize)]
struct LayerText {
    id: ArtifactId,
    #[serde(default)]
    content: Option<Content>,
}

impl From<Layer> for LayerText {
    fn from(layer: Layer) -> Self {
        Self {
            id: layer.build.artifact(Kind::Disk),
            content: layer.content,
        }
    }
}

impl TryFrom<LayerText> for Layer {
    type Error = String;

    fn try_from(text: LayerText) -> Result<Self, String> {
        let build = text.id.key().parse();
        let build = build.map_err(|_| format!("`{}` is not the id of a disk layer", text.id))?;
        match text.id.kind() {
            Kind::Disk => Ok(Self {
                build,
                content: text.content,
            }),
            _ => Err(format!("`{}` is not the id of a disk layer", text.id)),
        }
    }
}

/// Reason why bytes are not a valid manifest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// The JSON does not have the expected structure.
    #[error("failed to decode the manifest")]
    Json(#[from] serde_json::Error),
    /// The manifest was written by a later version of Wrenn.
    #[error("manifest version {0} is not supported, expected {VERSION} or 1")]
    Version(u32),
}

impl Manifest {
    /// Parses a manifest. A manifest of version 1 is converted.
    ///
    /// # Errors
    /// Fails if the bytes are not a manifest, or have a later version.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        match serde_json::from_slice::<Version>(bytes)?.version {
            1 => Ok(serde_json::from_slice::<v1::Manifest>(bytes)?.into()),
            VERSION => Ok(serde_json::from_slice(bytes)?),
            later => Err(ManifestError::Version(later)),
        }
    }

    /// Version of manifests that are written.
    pub const VERSION: u32 = VERSION;

    /// True if the content of all files is known.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let image = [&self.kernel, &self.initrd, &self.base_disk];
        image.iter().all(|file| file.artifact.is_some())
            && self.disk_layers.iter().all(|layer| layer.content.is_some())
            && self.header.is_some()
            && self.device.is_some()
            && !self.memory.is_empty()
    }

    /// Returns the ids of the disk layers, lowest first.
    pub fn layers(&self) -> impl Iterator<Item = SnapshotId> + '_ {
        self.disk_layers.iter().map(|layer| layer.build)
    }

    /// Returns all artifacts whose content is known, with those of the image.
    pub fn artifacts(&self) -> impl Iterator<Item = Artifact> + '_ {
        let image = [&self.kernel, &self.initrd, &self.base_disk];
        let image = image.into_iter().filter_map(|file| file.artifact.clone());
        let layers = self.disk_layers.iter().filter_map(Layer::artifact);
        let state = self.header.iter().chain(&self.device).cloned();
        image
            .chain(layers)
            .chain(self.memory.iter().cloned())
            .chain(state)
    }
}

impl Layer {
    /// Returns a layer whose content is not known.
    #[must_use]
    pub const fn unknown(build: SnapshotId) -> Self {
        Self {
            build,
            content: None,
        }
    }

    /// Returns the artifact, if its content is known.
    #[must_use]
    pub fn artifact(&self) -> Option<Artifact> {
        let content = self.content.clone()?;
        Some(Artifact {
            id: self.build.artifact(Kind::Disk),
            content,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// Manifest of release 0.1.0.
    const FIRST: &str = r#"{"version":1,"build":"00112233445566778899aabbccddeeff",
        "created_unix_ms":1,"vmm":"qemu 7.2.22","accel":"tcg","vcpus":1,"memory_mib":512,
        "disk_mib":5120,"kernel":"/var/lib/wrenn/images/kernels/k/vmlinux","initrd":"/i",
        "base_disk":"/b","disk_layers":["0123456789abcdef0123456789abcdef"],"template":"minimal",
        "default_user":"root","guest_token":"t"}"#;

    /// Manifest of this version.
    const SECOND: &str = include_str!("manifest/version-2.json");

    #[test]
    fn manifest_of_version_1_is_converted() {
        let read = Manifest::parse(FIRST.as_bytes()).unwrap();
        assert_eq!(read.version, 2);
        assert_eq!(read.requires.vmm.to_string(), "qemu 7.2.22");
        assert_eq!(read.requires.cpu, Accel::Tcg.cpu_of_0_1_0());
        assert_eq!(read.requires.machine, MachineProfile::first());
        let kernel = ImageFile::at("/var/lib/wrenn/images/kernels/k/vmlinux".into());
        assert_eq!(read.kernel, kernel);
        let layer = "0123456789abcdef0123456789abcdef".parse().unwrap();
        assert_eq!(read.layers().collect::<Vec<_>>(), [layer]);
        assert_eq!(read.artifacts().count(), 0);
        let written = serde_json::to_vec(&read).unwrap();
        assert_eq!(Manifest::parse(&written).unwrap(), read);
    }

    #[test]
    fn manifest_has_a_fixed_form_and_names_no_place_of_data() {
        let read = Manifest::parse(SECOND.as_bytes()).unwrap();
        let written: serde_json::Value = serde_json::to_value(&read).unwrap();
        let expected: serde_json::Value = serde_json::from_str(SECOND).unwrap();
        assert_eq!(written, expected);
        let ids: Vec<_> = read
            .artifacts()
            .map(|artifact| artifact.id.to_string())
            .collect();
        let build = "00112233445566778899aabbccddeeff";
        let layer = "0123456789abcdef0123456789abcdef";
        assert_eq!(
            ids,
            [
                "kernel/aa".to_owned(),
                "initrd/bb".to_owned(),
                "rootfs/cc".to_owned(),
                format!("disk/{layer}"),
                format!("mem/{build}"),
                format!("header/{build}"),
                format!("device/{build}"),
            ]
        );
    }

    #[test]
    fn later_version_is_rejected_by_its_number() {
        let later = FIRST.replace(r#""version":1"#, r#""version":3"#);
        let error = Manifest::parse(later.as_bytes()).unwrap_err();
        assert!(error.to_string().contains("version 3"), "{error}");
        let wrong = SECOND.replace("disk/0123", "mem/0123");
        assert!(Manifest::parse(wrong.as_bytes()).is_err());
    }
}
