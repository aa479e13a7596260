//! Snapshot together with everything that a VM needs to run from it.

use std::{
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    sync::Arc,
};

use wrenn_proto::{machine::MachineProfile, supervise::RestoreSpec};
use wrenn_snapshot::{Chain, ChainError, Header, Manifest, Snapshot, StoreError};
use wrenn_store::Artifact;

use super::{Remote, SnapshotError, SnapshotRef};

/// Snapshot whose files were located, with a reference that keeps it.
#[derive(Debug, Clone)]
pub(crate) struct LocatedSnapshot {
    snapshot: Snapshot,
    layers: Vec<PathBuf>,
    memory: Vec<PathBuf>,
    /// Object store with the memory files that are in none of the directories.
    remote: Option<Arc<Remote>>,
    pin: SnapshotRef,
}

impl LocatedSnapshot {
    pub(super) fn new(
        snapshot: Snapshot,
        layers: Vec<PathBuf>,
        memory: Vec<PathBuf>,
        pin: SnapshotRef,
    ) -> Self {
        Self {
            snapshot,
            layers,
            memory,
            remote: None,
            pin,
        }
    }

    pub(super) fn with_remote(self, remote: Option<Arc<Remote>>) -> Self {
        Self { remote, ..self }
    }

    /// Checks that the object store has the memory files that this host does not have.
    pub(super) fn require_remote(&self) -> Result<(), SnapshotError> {
        let Some(remote) = &self.remote else {
            return Ok(());
        };
        let name = |artifact: &Artifact| format!("{}.mem", artifact.id.key());
        let is_here = |artifact: &&Artifact| {
            let name = name(artifact);
            self.memory.iter().any(|dir| dir.join(&name).exists())
        };
        let mut memory = self.manifest().memory.iter();
        let missing = memory.find(|artifact| !is_here(artifact) && !remote.has(artifact));
        match missing {
            Some(artifact) => Err(SnapshotError::NotStored(name(artifact))),
            None => Ok(()),
        }
    }

    /// Opens the memory.
    pub(super) fn chain(&self, header: &Header) -> Result<Chain, ChainError> {
        let remote = |build| match &self.remote {
            Some(remote) => remote.diff(self.manifest(), build),
            None => Ok(None),
        };
        Chain::open_with(&self.memory, header, &remote)
    }

    pub(crate) fn manifest(&self) -> &Manifest {
        &self.snapshot.manifest
    }

    pub(super) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    pub(crate) fn pin(&self) -> SnapshotRef {
        self.pin.clone()
    }

    /// Read-only layers of the snapshot's disk, lowest first.
    pub(crate) fn disk_layers(&self) -> Vec<PathBuf> {
        self.layers.clone()
    }

    /// Returns the restore settings for a supervisor.
    pub(crate) fn restore(&self, prefetch: bool) -> RestoreSpec {
        RestoreSpec {
            build: self.pin.build(),
            snapshot: self.snapshot.dir.clone(),
            memory: self.memory.clone(),
            vmm: self.manifest().requires.vmm.to_string(),
            prefetch,
            remote: self.remote.as_ref().map(|remote| remote.spec.clone()),
        }
    }

    /// Returns the virtual hardware that a VM needs to be restored.
    pub(crate) fn machine(&self) -> MachineProfile {
        self.manifest().requires.machine.clone()
    }

    /// Returns kernel, initial RAM disk, base image of the disk, and default user.
    pub(crate) fn image(&self) -> (PathBuf, PathBuf, PathBuf, String) {
        let manifest = self.manifest();
        (
            manifest.kernel.path.clone(),
            manifest.initrd.path.clone(),
            manifest.base_disk.path.clone(),
            manifest.default_user.clone(),
        )
    }
}

/// Makes a layer read-only for all VMs. It was written under the user ID of the VM that owned it.
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
