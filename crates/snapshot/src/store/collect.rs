//! Garbage collection: removes files that no snapshot depends on.

use std::{collections::HashSet, fs, io, path::Path};

use rustix::fs::FlockOperation;

use super::{
    Store, StoreError, diff_name, failed,
    layer::{SUM_SUFFIX, sum_name},
    layer_name, names, on_disk,
};
use crate::SnapshotId;

impl Store {
    /// Removes all snapshots that are not in the result of `live`, then the diff files and disk
    /// layers that no remaining snapshot references, and incomplete snapshots. The result of `live`
    /// also contains the staged snapshots. Returns the freed space, in bytes.
    ///
    /// `live` is called after the existing snapshots were listed. A caller registers a snapshot
    /// before it stages the snapshot, so a new snapshot is either not listed or in the result of
    /// `live`.
    ///
    /// If a remaining snapshot cannot be read, no diff file and no disk layer is removed, because
    /// the snapshot may depend on any of them.
    ///
    /// # Errors
    /// Fails if `live` fails; nothing is removed in this case. Fails if a file cannot be listed or
    /// removed.
    pub fn collect<E: From<StoreError>>(
        &self,
        live: impl FnOnce() -> Result<HashSet<SnapshotId>, E>,
    ) -> Result<u64, E> {
        let _lock = self.lock(FlockOperation::LockExclusive)?;
        let mut seen = Vec::new();
        for area in ["snapshots", "staging"] {
            let dir = self.root.join(area);
            let builds = names(&dir, "")?.into_iter();
            seen.extend(builds.map(|build| (build, dir.join(build.to_string()))));
        }
        let live = live()?;
        let mut freed = 0;
        for (build, dir) in seen {
            if !live.contains(&build) {
                freed += remove_dir(&dir)?;
            }
        }
        let (mut diffs, mut layers) = (HashSet::new(), HashSet::new());
        for build in self.list()? {
            let (header, snapshot) = match (self.header(build), self.snapshot(build)) {
                (Ok(header), Ok(snapshot)) => (header, snapshot),
                (Err(error), _) | (_, Err(error)) => {
                    tracing::warn!(%build, %error, "snapshot unreadable, keeping all diff files and disk layers");
                    return Ok(freed);
                }
            };
            diffs.extend(header.diffs().iter().map(|diff| diff.build));
            layers.extend(snapshot.manifest.layers());
        }
        freed += sweep(&self.memory_dir(), ".mem", diff_name, &diffs)?;
        let disks = self.root.join("disks");
        freed += sweep(&disks, ".qcow2", layer_name, &layers)?;
        freed += sweep(&disks, SUM_SUFFIX, sum_name, &layers)?;
        Ok(freed)
    }
}

fn sweep(
    dir: &Path,
    suffix: &str,
    name: fn(SnapshotId) -> String,
    used: &HashSet<SnapshotId>,
) -> Result<u64, StoreError> {
    let mut freed = 0;
    for build in names(dir, suffix)? {
        if used.contains(&build) {
            continue;
        }
        let path = dir.join(name(build));
        freed += on_disk(&path);
        fs::remove_file(&path).map_err(failed("remove", &path))?;
    }
    Ok(freed)
}

/// Removes the directory of a snapshot and returns the freed space, in bytes. A staged snapshot may
/// remove its own directory at the same time.
fn remove_dir(path: &Path) -> Result<u64, StoreError> {
    let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let freed = match fs::read_dir(path) {
        Ok(entries) => entries.flatten().map(|entry| on_disk(&entry.path())).sum(),
        Err(error) if gone(&error) => return Ok(0),
        Err(error) => return Err(failed("list", path)(error)),
    };
    match fs::remove_dir_all(path) {
        Err(error) if !gone(&error) => Err(failed("remove", path)(error)),
        _ => Ok(freed),
    }
}
