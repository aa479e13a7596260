//! Template snapshots of templates, and the reasons why a template has none.
//!
//! Without a usable template snapshot, every create boots, which takes seconds instead of a
//! fraction of one. The reason is logged when it changes, and reported in the description of the
//! host.

use std::{collections::HashMap, path::Path};

use parking_lot::Mutex;
use thiserror_ext::AsReport as _;
use wrenn_model::{CpuModel, TemplateName};
use wrenn_proto::{
    machine::{MachineProfile, VmmKind},
    supervise::Accel,
};
use wrenn_snapshot::{HostVmms, Incompatible, Manifest, Store};

use super::{
    LocatedSnapshot, SnapshotError, Snapshots,
    image_files::{Holder, ImageFiles},
    names::Names,
};
use crate::Template;

/// Reason why a template cannot be restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotRestorable {
    /// No snapshot was made for this VMM and accelerator.
    #[error("the template has no template snapshot for {0}")]
    Missing(&'static str),
    /// This host cannot load the snapshot.
    #[error("the template snapshot cannot be used: {0}")]
    Incompatible(Incompatible),
    /// The snapshot is damaged or cannot be read. The text names the cause.
    #[error("the template snapshot cannot be used: {0}")]
    Unusable(String),
    /// The snapshot was made from other files.
    #[error("the template snapshot was made from another build of the template")]
    OtherImage,
    /// The snapshot was made with another CPU model.
    #[error(
        "the template snapshot was made with the CPU model `{made}`, but this host uses `{here}`"
    )]
    OtherCpu {
        /// Model of the snapshot.
        made: CpuModel,
        /// Model of VMs that boot here.
        here: CpuModel,
    },
    /// The snapshot has another size.
    #[error("the template snapshot and the template differ in vCPUs or memory")]
    OtherSize,
}

impl From<SnapshotError> for NotRestorable {
    fn from(error: SnapshotError) -> Self {
        match error {
            SnapshotError::Incompatible(error) => Self::Incompatible(error),
            error => Self::Unusable(error.to_report_string()),
        }
    }
}

/// State of a template's snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TemplateSnapshotState {
    /// There is none, or it belongs to another version of the template or to another CPU model.
    Missing,
    /// This host cannot load it.
    Unloadable,
    /// Usable, but a new one would have other devices.
    Older,
    /// Usable, with the devices of a new one.
    Current,
}

/// Templates that cannot be restored, each with the reason that was logged last.
#[derive(Debug, Default)]
pub(super) struct ColdTemplates(Mutex<HashMap<TemplateName, String>>);

impl ColdTemplates {
    /// Logs the reason if it differs from the last one.
    fn note(&self, template: &TemplateName, reason: Option<&NotRestorable>) {
        let mut known = self.0.lock();
        let Some(reason) = reason.map(ToString::to_string) else {
            known.remove(template);
            return;
        };
        if known.get(template) != Some(&reason) {
            tracing::warn!(%template, reason, "no usable template snapshot, creates boot; run `wrenn image build`");
            known.insert(template.clone(), reason);
        }
    }
}

impl Snapshots {
    /// Returns the template snapshot of a template, if it exists and matches this host, its CPU
    /// model, and the template.
    pub(crate) fn template_snapshot(
        &self,
        template: &Template,
    ) -> Result<LocatedSnapshot, NotRestorable> {
        let found = self.find_template_snapshot(template);
        self.cold.note(&template.name, found.as_ref().err());
        found
    }

    /// Same as [`template_snapshot`](Self::template_snapshot), without a log entry.
    pub(crate) fn find_template_snapshot(
        &self,
        template: &Template,
    ) -> Result<LocatedSnapshot, NotRestorable> {
        let (kind, accel) = self.vmms.boots();
        let variant = variant(kind, accel);
        let missing = || NotRestorable::Missing(variant);
        let name = template_snapshot_name(&template.name, variant).map_err(|_| missing())?;
        let pin = self.pinned(&self.image_names, &name)?.ok_or_else(missing)?;
        check(&self.find(pin.id())?.manifest, template, &self.cpu)?;
        Ok(self.locate(&pin)?)
    }

    /// Returns the state of a template's snapshot.
    pub(crate) fn template_snapshot_state(&self, template: &Template) -> TemplateSnapshotState {
        match self.find_template_snapshot(template) {
            Ok(located) if located.machine() == MachineProfile::current(self.vmms.boots().0) => {
                TemplateSnapshotState::Current
            }
            Ok(_) => TemplateSnapshotState::Older,
            Err(NotRestorable::Incompatible(_)) => TemplateSnapshotState::Unloadable,
            Err(_) => TemplateSnapshotState::Missing,
        }
    }
}

/// Returns the reason why a template of an image directory cannot be restored; `None` if it can.
/// Only reads, and needs no agent.
pub(crate) fn examine(
    images_dir: &Path,
    template: &Template,
    host: &HostVmms,
    cpu: &CpuModel,
) -> Option<NotRestorable> {
    let dir = images_dir.join("snapshots");
    let examine = || -> Result<(), NotRestorable> {
        let variant = variant(host.boots.kind, host.boots.accel);
        let missing = || NotRestorable::Missing(variant);
        let name = template_snapshot_name(&template.name, variant).map_err(|_| missing())?;
        let record = Names::at(&dir.join("names")).get(&name);
        let record = record.map_err(SnapshotError::from)?.ok_or_else(missing)?;
        let snapshot = Store::at(&dir).snapshot(record.build);
        let mut manifest = snapshot.map_err(SnapshotError::from)?.manifest;
        ImageFiles::of(images_dir, &dir.join("images")).locate(&mut manifest, Holder::ImageDir);
        check(&manifest, template, cpu)?;
        manifest.check(host).map_err(NotRestorable::Incompatible)
    };
    examine().err()
}

/// Checks that a snapshot has the files and the size of a template, and a CPU model.
fn check(manifest: &Manifest, template: &Template, cpu: &CpuModel) -> Result<(), NotRestorable> {
    let files = [&manifest.kernel, &manifest.initrd, &manifest.base_disk].map(|file| &file.path);
    if files != [&template.kernel, &template.initrd, &template.rootfs] {
        return Err(NotRestorable::OtherImage);
    }
    let made = manifest.requires.cpu.clone();
    if made != *cpu {
        let here = cpu.clone();
        return Err(NotRestorable::OtherCpu { made, here });
    }
    let size = (manifest.size.vcpus, manifest.size.memory_mib);
    if size != (template.vcpus, template.memory_mib) {
        return Err(NotRestorable::OtherSize);
    }
    Ok(())
}

/// Variants of a template's snapshots: one per VMM and accelerator.
pub(crate) const VARIANTS: [&str; 3] = ["kvm", "tcg", "firecracker"];

/// Returns the variant of a template's snapshot that a host restores. Those of QEMU have the names
/// that they had before there was another VMM.
pub(crate) const fn variant(kind: VmmKind, accel: Accel) -> &'static str {
    match (kind, accel) {
        (VmmKind::Qemu, Accel::Kvm) => "kvm",
        (VmmKind::Qemu, Accel::Tcg) => "tcg",
        (VmmKind::Firecracker, _) => "firecracker",
    }
}

/// Returns the name of a template's snapshot in the image store.
pub(crate) fn template_snapshot_name(
    template: &TemplateName,
    variant: &str,
) -> Result<TemplateName, String> {
    let name = format!("warm-{template}-{variant}");
    name.parse().map_err(|_| name)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs;

    use wrenn_disk::ToolJails;

    use super::{
        super::image_files::tests::{image_store, manifest},
        *,
    };
    use crate::vmms::Vmms;

    const VMM: &str = "qemu 7.2.22";

    /// Stores a template snapshot with the manifest of `stored`.
    fn store(images: &Path, stored: &Manifest) {
        image_store(images, 1);
        let snapshots = images.join("snapshots");
        let dir = snapshots.join("snapshots").join(stored.build.to_string());
        fs::create_dir_all(&dir).unwrap();
        fs::write(
            dir.join("manifest.json"),
            serde_json::to_vec(stored).unwrap(),
        )
        .unwrap();
        fs::create_dir_all(snapshots.join("names")).unwrap();
        let record = serde_json::json!({ "build": stored.build });
        let name = snapshots.join("names/warm-minimal-tcg.json");
        fs::write(name, record.to_string()).unwrap();
    }

    fn template(images: &Path) -> Template {
        Template {
            name: "minimal".parse().unwrap(),
            kernel: images.join("kernels/key/vmlinux"),
            initrd: images.join("kernels/key/initrd.img"),
            rootfs: images.join("rootfs/key/rootfs.ext4"),
            vcpus: 1,
            memory_mib: 256,
            size_bytes: 0,
            created_unix_ms: 0,
            default_user: "root".to_owned(),
        }
    }

    fn host() -> HostVmms {
        Vmms::with_version(VMM, Accel::Tcg).current()
    }

    fn open(images: &Path) -> Snapshots {
        let root = images.with_extension("data");
        let cpu = "max".parse().unwrap();
        let vmms = Vmms::with_version(VMM, Accel::Tcg);
        let tools = ToolJails::new(Path::new("/nowhere"), |_| Ok(Vec::new()));
        Snapshots::open(&root, images, vmms, cpu, tools, None).unwrap()
    }

    #[test]
    fn template_is_restored_after_its_image_directory_was_moved_or_copied() {
        let dir = tempfile::tempdir().unwrap();
        let first = dir.path().join("first");
        for stored in [manifest(""), manifest(&format!("{}/", first.display()))] {
            store(&first, &stored);
            open(&first).template_snapshot(&template(&first)).unwrap();
            let copied = dir.path().join("copied");
            store(&copied, &stored);
            open(&copied).template_snapshot(&template(&copied)).unwrap();
            let moved = dir.path().join("moved");
            fs::rename(&first, &moved).unwrap();
            open(&moved).template_snapshot(&template(&moved)).unwrap();
            let cpu = "max".parse().unwrap();
            let cold = examine(&moved, &template(&moved), &host(), &cpu);
            assert!(cold.is_none(), "{cold:?}");
            fs::remove_dir_all(&moved).unwrap();
        }
    }

    #[test]
    fn template_that_boots_has_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        image_store(&images, 1);
        let reason = |stored: Option<Manifest>| {
            if let Some(stored) = stored {
                store(&images, &stored);
            }
            let cpu = "max".parse().unwrap();
            let template = template(&images);
            let examined = examine(&images, &template, &host(), &cpu);
            let reason = open(&images).template_snapshot(&template).err();
            let reason = reason.unwrap().to_string();
            assert_eq!(examined.unwrap().to_string(), reason);
            reason
        };
        assert_eq!(
            reason(None),
            "the template has no template snapshot for tcg"
        );
        let mut other = manifest("");
        other.requires.vmm = "qemu 9.0.0".into();
        let text = reason(Some(other));
        assert!(text.contains("qemu 9.0.0") && text.contains(VMM), "{text}");
        let mut other = manifest("");
        other.requires.cpu = "host".parse().unwrap();
        let text = reason(Some(other));
        assert!(text.contains("`host`") && text.contains("`max`"), "{text}");
        let mut other = manifest("");
        other.size.memory_mib = 512;
        assert!(reason(Some(other)).contains("differ in vCPUs"));
        let mut other = manifest("");
        other.base_disk.path = "rootfs/other/rootfs.ext4".into();
        assert!(reason(Some(other)).contains("another build"));
    }
}
