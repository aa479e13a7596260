//! A snapshot with everything that a machine needs to go on from it.

use std::{
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
};

use wrenn_proto::supervise::RestoreSpec;
use wrenn_snapshot::{Manifest, Snapshot, StoreError};

use super::PinnedBuild;

/// A frozen moment, found and pinned.
#[derive(Debug, Clone)]
pub(crate) struct Moment {
    snapshot: Snapshot,
    layers: Vec<PathBuf>,
    memory: Vec<PathBuf>,
    pin: PinnedBuild,
}

impl Moment {
    pub(super) fn new(
        snapshot: Snapshot,
        layers: Vec<PathBuf>,
        memory: Vec<PathBuf>,
        pin: PinnedBuild,
    ) -> Self {
        Self {
            snapshot,
            layers,
            memory,
            pin,
        }
    }

    pub(crate) fn manifest(&self) -> &Manifest {
        &self.snapshot.manifest
    }

    pub(super) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    pub(crate) fn pin(&self) -> PinnedBuild {
        self.pin.clone()
    }

    /// Frozen layers of its disk, the lowest first.
    pub(crate) fn disk_layers(&self) -> Vec<PathBuf> {
        self.layers.clone()
    }

    /// What a supervisor needs.
    pub(crate) fn restore(&self, prefetch: bool) -> RestoreSpec {
        RestoreSpec {
            build: self.pin.build(),
            snapshot: self.snapshot.dir.clone(),
            memory: self.memory.clone(),
            prefetch,
        }
    }

    /// Kernel, initial RAM disk, image under the disk, and default user.
    pub(crate) fn image(&self) -> (PathBuf, PathBuf, PathBuf, String) {
        let manifest = self.manifest();
        (
            manifest.kernel.clone(),
            manifest.initrd.clone(),
            manifest.base_disk.clone(),
            manifest.default_user.clone(),
        )
    }
}

/// A layer was written by a machine's own user. From now on every machine may read it, and none may write.
pub(super) fn protect_layer(path: &Path) -> Result<(), StoreError> {
    const READ_ONLY: u32 = 0o444;
    let protect = || {
        let meta = std::fs::metadata(path)?;
        if meta.uid() != 0 {
            chown(path, Some(0), Some(0))?;
        }
        if meta.mode() & 0o777 != READ_ONLY {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(READ_ONLY))?;
        }
        Ok(())
    };
    protect().map_err(|source| StoreError::Io {
        step: "protect",
        path: path.to_owned(),
        source,
    })
}
