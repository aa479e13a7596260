//! Disk of a VM, in the form that its VMM takes.
//!
//! A VMM that reads qcow2 opens the chain itself, and puts a new overlay on top of it. For any
//! other VMM, an [`Export`] presents the chain as one raw file and does the same. Either way the
//! disk on the host is a chain of qcow2 files, so that snapshots, forks and compaction are the same
//! for every VMM.
//!
//! | step of a snapshot | VMM reads qcow2          | exported disk                        |
//! |--------------------|--------------------------|--------------------------------------|
//! | before the save    | the VMM switches         | -                                    |
//! | save               | the VMM flushes its file | -                                    |
//! | after the save     | -                        | the exporter flushes, and switches   |
//! | failure            | the VM is resumed        | the VM is resumed; if the exporter   |
//! |                    |                          | did not answer, the VM is ended      |

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::fs::{Gid, Uid, chown};
use wrenn_disk::{DiskError, Export, ExportConfig, MountedExport};
use wrenn_proto::supervise::{SupervisorSpec, files};
use wrenn_vmm::{DiskForm, Machine};

use crate::SupervisorError;

/// Disk of a VM.
pub(crate) struct GuestDisk {
    /// Disk files above the base image, lowest first. The last one is writable.
    files: Vec<PathBuf>,
    exported: Option<Exported>,
}

struct Exported {
    export: Export,
    /// User and group ID of the exporter.
    uid: u32,
    /// True if the exporter did not answer, so that the VM may write to either of two files.
    is_undecided: bool,
}

/// Paths that the disk of a sandbox needs.
pub(crate) struct DiskPlace {
    overlay: PathBuf,
    export: PathBuf,
    wrenn_exe: PathBuf,
}

impl DiskPlace {
    /// Returns the paths of the sandbox in `dir`. A raw view is exported by `wrenn_exe`.
    pub(crate) fn new(dir: &Path, wrenn_exe: PathBuf) -> Self {
        Self {
            overlay: dir.join(files::DISK),
            export: dir.join(files::EXPORT),
            wrenn_exe,
        }
    }
}

/// Disk of a VM that is about to be launched. A raw view is mounted, and its exporter starts while
/// the VMM starts: the jail of the VMM needs the path, and the VMM opens the file later.
pub(crate) enum NewDisk<'a> {
    /// The VMM opens the files itself.
    Chain,
    /// Mounted raw view.
    Raw {
        mounted: MountedExport<'a>,
        /// User and group ID of the exporter.
        uid: u32,
    },
}

impl<'a> NewDisk<'a> {
    /// Prepares the disk of a sandbox, whose paths are in `place`.
    pub(crate) fn open(
        form: DiskForm,
        spec: &'a SupervisorSpec,
        place: &'a DiskPlace,
    ) -> Result<Self, SupervisorError> {
        let (DiskForm::Raw, Some(firecracker)) = (form, &spec.firecracker) else {
            return Ok(Self::Chain);
        };
        let uid = firecracker.exporter_uid;
        give(&place.overlay, uid)?;
        let mounted = Export::mount(ExportConfig {
            wrenn_exe: &place.wrenn_exe,
            cgroups: spec.cgroups.clone(),
            uid,
            reader_uid: spec.uid,
            base: &spec.base_disk,
            layers: &spec.disk_layers,
            overlay: &place.overlay,
            size_mib: spec.size.disk_mib,
            dir: &place.export,
        })?;
        Ok(Self::Raw { mounted, uid })
    }

    /// Returns the path of the disk for the VMM: the writable file, or the raw view.
    pub(crate) fn vmm_path(&self, place: &DiskPlace) -> PathBuf {
        match self {
            Self::Chain => place.overlay.clone(),
            Self::Raw { mounted, .. } => mounted.path(),
        }
    }

    /// Makes the disk usable.
    pub(crate) async fn start(
        self,
        spec: &SupervisorSpec,
        place: &DiskPlace,
    ) -> Result<GuestDisk, SupervisorError> {
        let mut files = spec.disk_layers.clone();
        files.push(place.overlay.clone());
        let exported = match self {
            Self::Chain => None,
            Self::Raw { mounted, uid } => Some(Exported {
                export: mounted.start().await?,
                uid,
                is_undecided: false,
            }),
        };
        Ok(GuestDisk { files, exported })
    }
}

impl GuestDisk {
    /// Returns the disk files above the base image, lowest first. The last one is writable.
    pub(crate) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Returns the file that the VM writes to.
    pub(crate) fn writable(&self) -> &Path {
        self.files.last().map_or(Path::new(""), PathBuf::as_path)
    }

    /// Waits until the disk can no longer be used, and returns the reason. Cancel safe.
    pub(crate) async fn failed(&mut self) -> SupervisorError {
        match &mut self.exported {
            Some(exported) => SupervisorError::DiskExport(exported.export.wait().await),
            None => std::future::pending().await,
        }
    }

    /// Puts the empty overlay `next` on top of the disk before the VM is saved, if the VMM does it.
    pub(crate) async fn before_save<M: Machine>(
        &mut self,
        machine: &mut M,
        next: Option<&Path>,
    ) -> Result<(), SupervisorError> {
        let (None, Some(next)) = (&self.exported, next) else {
            return Ok(());
        };
        let overlay = fs::File::options().read(true).write(true).open(next);
        let overlay = overlay.map_err(|source| SupervisorError::ReadSpec {
            path: next.to_owned(),
            source,
        })?;
        machine.switch_disk(overlay.into()).await?;
        self.files.push(next.to_owned());
        Ok(())
    }

    /// Flushes the disk of a saved VM, and puts the empty overlay `next` on top of it, unless the
    /// VMM did.
    pub(crate) async fn after_save(&mut self, next: Option<&Path>) -> Result<(), SupervisorError> {
        let Some(exported) = &mut self.exported else {
            return Ok(());
        };
        exported.flush_and_switch(next).await?;
        self.files.extend(next.map(Path::to_owned));
        Ok(())
    }

    /// True if the VM must end, because it may write to either of two files.
    pub(crate) fn is_undecided(&self) -> bool {
        self.exported.as_ref().is_some_and(|e| e.is_undecided)
    }

    /// Ends the export without a flush. A VMM that waits for an exporter cannot be killed before
    /// the exporter has ended.
    pub(crate) fn close(&mut self) {
        self.exported = None;
    }
}

impl Exported {
    async fn flush_and_switch(&mut self, next: Option<&Path>) -> Result<(), SupervisorError> {
        let done = match next {
            Some(next) => {
                give(next, self.uid)?;
                self.export.switch(next).await
            }
            None => self.export.flush().await,
        };
        self.is_undecided = matches!(done, Err(DiskError::Deadline { .. }));
        Ok(done?)
    }
}

/// Makes a disk file belong to the exporter.
fn give(path: &Path, uid: u32) -> Result<(), SupervisorError> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    chown(path, Some(user), Some(group)).map_err(|error| SupervisorError::Write {
        path: path.to_owned(),
        source: error.into(),
    })
}
