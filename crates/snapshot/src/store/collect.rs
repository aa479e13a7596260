//! Giving back what nobody stands on.

use std::{collections::HashSet, fs, io, path::Path};

use rustix::fs::FlockOperation;

use super::{Store, StoreError, diff_name, failed, layer_name, names, on_disk};
use crate::BuildId;

impl Store {
    /// Removes every snapshot that is not in what `live` returns, then the diff files and disk layers that no remaining one needs,
    /// and what was left half made. `live` also names those in the making. Returns what was given back, bytes.
    ///
    /// `live` is asked after it was seen what there is: who begins a snapshot says so first, and so is either not seen or known.
    ///
    /// Where one of the remaining snapshots cannot be read, no diff file and no layer is removed: it may stand on any of them.
    ///
    /// # Errors
    /// If `live` has one: then all stays. If something cannot be listed or removed.
    pub fn collect<E: From<StoreError>>(
        &self,
        live: impl FnOnce() -> Result<HashSet<BuildId>, E>,
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
                    tracing::warn!(%build, %error, "a snapshot cannot be read: nothing that it may stand on is removed");
                    return Ok(freed);
                }
            };
            diffs.extend(header.diffs().iter().map(|diff| diff.build));
            layers.extend(snapshot.manifest.disk_layers);
        }
        freed += sweep(&self.memory_dir(), ".mem", diff_name, &diffs)?;
        freed += sweep(&self.root.join("disks"), ".qcow2", layer_name, &layers)?;
        Ok(freed)
    }
}

fn sweep(
    dir: &Path,
    suffix: &str,
    name: fn(BuildId) -> String,
    used: &HashSet<BuildId>,
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

/// One in the making may go by itself meanwhile.
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
