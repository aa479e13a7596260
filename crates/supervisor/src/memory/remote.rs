//! Memory diffs that are in an object store.

use std::{collections::HashMap, fs, io, time::Duration};

use wrenn_proto::supervise::{RemoteSpec, RestoreSpec};
use wrenn_snapshot::{Manifest, SnapshotId, layout};
use wrenn_store::{
    Artifact, ArtifactStore as _, Cache, ReadAt, RemoteSettings, RemoteStore, StoreError,
};

use crate::SupervisorError;

/// Diff files of a snapshot in an object store.
pub(super) struct RemoteMemory {
    store: RemoteStore,
    diffs: HashMap<SnapshotId, Artifact>,
}

impl RemoteMemory {
    /// Reads the descriptions of the diff files. `None` if the snapshot has no remote ones. Does not
    /// connect yet.
    pub(super) fn open(restore: &RestoreSpec) -> Result<Option<Self>, SupervisorError> {
        let Some(spec) = &restore.remote else {
            return Ok(None);
        };
        let path = restore.snapshot.join(layout::MANIFEST);
        let read = |source| SupervisorError::ReadSpec {
            path: path.clone(),
            source,
        };
        let bytes = fs::read(&path).map_err(read)?;
        let manifest = Manifest::parse(&bytes).map_err(|error| read(io::Error::other(error)))?;
        let diffs = manifest.memory.into_iter().filter_map(|artifact| {
            let build = artifact.id.key().parse().ok()?;
            Some((build, artifact))
        });
        Ok(Some(Self {
            store: store(spec)?,
            diffs: diffs.collect(),
        }))
    }

    /// Opens a diff file; `None` if the object store is not known to have it.
    pub(super) fn diff(&self, build: SnapshotId) -> io::Result<Option<Box<dyn ReadAt>>> {
        let Some(artifact) = self.diffs.get(&build) else {
            return Ok(None);
        };
        self.store
            .open(artifact)
            .map(Some)
            .map_err(io::Error::other)
    }
}

fn store(spec: &RemoteSpec) -> Result<RemoteStore, StoreError> {
    let cache = Cache::open(&spec.cache, spec.cache_bytes, spec.room_bytes)?;
    let settings = RemoteSettings {
        url: spec.url.clone(),
        endpoint: spec.endpoint.clone(),
        region: spec.region.clone(),
        credentials: None,
        retry: Duration::from_secs(spec.retry_sec),
    };
    RemoteStore::new(&settings, cache)
}
